"""The published models built on neighborhood attention, by name and as classes."""

from flax_layers.models._count import count_macs as count_macs
from flax_layers.models._count import count_parameters as count_parameters
from flax_layers.models._registry import config as config
from flax_layers.models._registry import create as create
from flax_layers.models._registry import names as names
from flax_layers.models._registry import register as register
from flax_layers.models._stylenat import StyleNAT as StyleNAT
from flax_layers.models._vision import NAT as NAT
from flax_layers.models._vision import DiNATs as DiNATs
from flax_layers.models._vision import Isotropic as Isotropic
