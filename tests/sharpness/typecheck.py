"""The checker of annotations: beartype, taking an int where a float is asked for."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
