# ruff: noqa: F401
"""Imported once by the fork server: everything that a run imports, and not one computation."""

import peft
import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3
from transformers import GenerationMixin, Trainer

import opsdc.cli
import opsdc.eval.report
import opsdc.train
import opsdc_kernels.chunked.op
from helpers.tiny import byte_tokenizer

torch.set_num_threads(1)
byte_tokenizer()
