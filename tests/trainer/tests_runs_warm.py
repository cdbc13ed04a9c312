# ruff: noqa: F401
"""Imported once by the fork server: everything that a run imports, and not one computation."""

import peft
import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3
from tests_tiny import byte_tokenizer
from transformers import GenerationMixin, Trainer

import opsdc.cli
import opsdc.report
import opsdc.train
import opsdc_kernels.chunked.op

torch.set_num_threads(1)
byte_tokenizer()
