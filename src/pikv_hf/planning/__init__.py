"""Planning before renting: what fits on a cluster, what a step costs, from a model's config alone."""

from .hardware import DEVICES, Device, find_device, parse_devices

__all__ = ["DEVICES", "Device", "find_device", "parse_devices"]
