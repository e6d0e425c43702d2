from asam_jax._ascent import ascent
from asam_jax._ascent import AscentState
from asam_jax._arguments import is_not_bias
from asam_jax._geometry import *
from asam_jax._geometry import Geometry, elementwise, filterwise, layerwise
from asam_jax._describe import describe
