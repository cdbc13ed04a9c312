"""Metadata and extras; tool settings live in pyproject.toml, CPU pins in constraints-cpu.txt."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "lora": ["peft>=0.17"],
    "qlora": ["peft>=0.17", "bitsandbytes>=0.46"],
    "liger": ["liger-kernel>=0.6"],
    "eval": ["math-verify>=0.8", "reasoning-gym>=0.1.25"],
    "plot": ["matplotlib>=3.8"],
    "embedded": ["gguf>=0.17"],
    # Exactly: examples/trl_trainer.py replaces a private name of it.
    "trl": ["trl==1.16.0; python_version >= '3.11'"],
    "vllm": ["vllm>=0.27,<0.33"],
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.6",
        "mkdocstrings>=0.30",
        "mkdocstrings-python>=1.16",
    ],
    "bench": ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8"],
}
IN_DEV = ("qlora", "liger", "eval", "plot", "embedded", "trl", "docs", "bench")
EXTRAS["dev"] = [
    "build>=1.2",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "mpmath>=1.3",
    "mypy>=1.15",
    "ruff>=0.12",
    "types-PyYAML",
    "types-tqdm",
    *(package for name in IN_DEV for package in EXTRAS[name]),
]

setup(
    name="opsdc",
    version="0.1.0",
    description="On-policy self-distillation of reasoning models on fused divergence kernels",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The OPSDC contributors",
    project_urls={"Paper": "https://arxiv.org/abs/2603.05433"},
    keywords=[
        "distillation",
        "self-distillation",
        "reasoning",
        "language models",
        "KL divergence",
        "triton",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["opsdc*", "opsdc_kernels*"]),
    package_data={
        "opsdc": [
            "py.typed",
            "data/*.yaml",
            "eval/*.j2",
            "instructions/*.txt",
            "models/*.yaml",
            "recipes/*.yaml",
        ],
        "opsdc_kernels": ["py.typed", "measured.json", "row_pass/*.[ch]", "columns/columns.c"],
    },
    install_requires=[
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
        "transformers>=5.0",
        "accelerate>=1.0",
        "datasets>=3.0",
        "safetensors>=0.5",
        "PyYAML>=6.0",
        "pydantic>=2.10",
        "typing_extensions>=4.12",
        "numpy>=1.26",
        "tqdm>=4.66",
        "jinja2>=3.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["opsdc = opsdc.cli:main"]},
)
