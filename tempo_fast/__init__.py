"""tempo-fast: preference training that teaches video LLMs when things happen.

Importing this package touches neither CUDA nor transformers, DALI or DeepSpeed; every heavy library is imported where
it is used.
"""

__version__ = "0.1.0"
