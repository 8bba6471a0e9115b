from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SOURCE = (HERE / "fipa_jax/__init__.py").read_text()
VERSION = next(line for line in SOURCE.splitlines() if line.startswith("__version__ = "))
TFDS = ["tensorflow-datasets>=4.9.9", "array_record>=0.8", "importlib_resources>=6", "pillow>=10"]
PLOTS = ["matplotlib>=3.8"]
DATASETS = ["scikit-learn>=1.4"]  # which brings the digits
TABLES = ["pyarrow>=15"]

setup(
    name="fipa_jax",
    version=VERSION.split('"')[1],
    description="Federated learning in JAX with Fisher-informed parameterwise aggregation (FIPA)",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fipa_jax", "fipa_jax.*"]),
    package_dir={"": "."},  # an editable install is then a plain path, which type checkers follow
    package_data={"fipa_jax": ["py.typed"]},
    install_requires=[
        "absl-py>=2",
        "chex>=0.1.90",
        "flax>=0.12",
        "jax>=0.10,<0.12",
        "jaxlib>=0.10,<0.12",
        "ml-collections>=1.0",
        "numpy>=2",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "tqdm>=4.66",
    ],
    extras_require={
        "tfds": TFDS,
        "plots": PLOTS,
        "datasets": DATASETS,
        "tables": TABLES,
        "docs": ["furo>=2025.12.19", "myst-nb>=1.4", "Sphinx>=9.0.4"],  # docs/requirements.txt pins what is tested
        # Models of other libraries that docs/recipes trains.
        "recipes": ["dm-haiku>=0.0.14", "equinox>=0.13"],
        "tensorboard": ["tensorboardX>=2.6.4"],  # writes the files; the package tensorboard shows them
        "wandb": ["wandb>=0.22"],
        "mlflow": ["mlflow-skinny>=3.2", "sqlalchemy>=2", "alembic>=1.10"],  # with its database on the disk
        # What scripts/benchmark.py measures beside this package, pinned. pfl==0.6.0 and fedjax==0.0.17 ask for other
        # versions of shared packages: each needs an environment of its own.
        "peers": ["curvlinops-for-pytorch==3.0.1", "matfree==0.6.3", "scipy==1.17.1", "torch==2.15.0"],
        "test": [
            *TFDS,
            *PLOTS,
            *DATASETS,
            *TABLES,
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
        ],
    },
)
