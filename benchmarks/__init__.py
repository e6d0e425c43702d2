"""What a step costs, against the floor, the hand-written step and the peers."""
