"""Planning before renting: what fits on a cluster, what a step costs, from a model's config alone."""

from .hardware import DEVICES, Device, find_device, parse_devices
from .model_shape import ModelShape, load_config, shape_of
from .plan import Workload
from .recommend import Plan, make_plan

__all__ = [
    "DEVICES",
    "Device",
    "ModelShape",
    "Plan",
    "Workload",
    "find_device",
    "load_config",
    "make_plan",
    "parse_devices",
    "shape_of",
]
