"""What mcf is made of, and the ranges that were tried.

torch comes first and by hand (the Makefile shows how), because only the user knows which build fits the machine:
DeepSpeed's own setup imports it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "mcf/__init__.py").read_text()).group(1)

setup(
    name="mcf",
    version=VERSION,
    description="Pre-training of face encoders on a cluster: Mask Contrastive Face (ACM MM 2023)",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    # `kernels` is another project's name on PyPI: ours is a package inside mcf, in a folder of its own.
    packages=["mcf.kernels", "mcf.kernels.bench", *find_packages(include=["mcf", "mcf.*"]), "mcf.recipes"],
    package_dir={"mcf": "mcf", "mcf.kernels": "kernels", "mcf.recipes": "recipes"},
    package_data={"mcf": ["attention_table.csv"], "mcf.recipes": ["*.yaml", "machines/*.yaml"]},
    install_requires=[
        "torch>=2.10,<2.15",
        "deepspeed>=0.19,<0.20",
        "triton>=3.6,<3.9",
        "nvidia-dali-cuda130>=2.1,<3",
        "submitit>=1.5.2,<2",
        "xformers>=0.0.35,<0.1",
        # What xformers' wheel is linked with, whatever CUDA torch has (mcf.attention loads it).
        "nvidia-cuda-runtime-cu12>=12.8,<13; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "mlflow>=3.10,<4",
        "pyyaml>=6,<7",
        "pydantic>=2.7,<3",
        "numpy>=1.26,<3",
        "pillow>=10.3",
        "scipy>=1.11",
        "safetensors>=0.4.3",
        "fsspec>=2024.2",
        "rich>=13",
        "matplotlib>=3.8",
        "psutil>=5.9",
    ],
    extras_require={
        "remote": ["s3fs>=2025.2"],
        "detector": ["opencv-python-headless>=4.9"],
        "onnx": ["onnxscript>=0.6", "onnxruntime>=1.23"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "scikit-learn>=1.4",
            "moto[server]>=5.2",
            "s3fs>=2025.2",
            "webdataset>=0.2.86",
            "opencv-python-headless>=4.9",
            "onnxscript>=0.6",
            "onnxruntime>=1.23",
            "transformers>=5,<6",
        ],
    },
)
