"""The PTX of the decode step, followed instruction by instruction: no GPU is needed to know what it computes."""

import re

import numpy as np
import pytest
import torch

from pikv_hf.kernels import dispatch
from pikv_hf.kernels.page_codes import FP8_MAX

from triton_cases import BACKEND

dispatch.load("paged_decode_attention", BACKEND)
