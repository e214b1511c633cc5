"""Two import packages in one distribution: ``tempo_fast``, and ``tempo_kernels`` out of ``kernels/``.

``kernels/`` has no ``__init__.py``: a package of that name at the root would shadow the Hugging Face ``kernels``
library whenever Python starts in the repository. Everything else about the distribution stands in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(".", include=["tempo_fast", "tempo_fast.*"])
    + find_packages("kernels", include=["tempo_kernels", "tempo_kernels.*"]),
    package_dir={"tempo_fast": "tempo_fast", "tempo_kernels": "kernels/tempo_kernels"},
)
