import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCE = (HERE / "fipa_jax/__init__.py").read_text()
VERSION = next(line for line in SOURCE.splitlines() if line.startswith("__version__ = "))
SHIPPED = ("configs/*.py", "scripts/train.py", "scripts/summarise.py", "scripts/prepare_data.py")
# What an experiment by a config needs, beside what the mathematics does.
EXPERIMENTS = [
    "absl-py>=2",
    "flax>=0.12",
    "matplotlib>=3.8",
    "ml-collections>=1.0",
    "orbax-checkpoint>=0.12",
    "scipy>=1.14",
    "tqdm>=4.66",
]
TFDS = ["tensorflow-datasets>=4.9.9", "array_record>=0.8", "importlib_resources>=6", "pillow>=10"]
DATASETS = ["scikit-learn>=1.4"]  # which brings the digits
TABLES = ["pyarrow>=15"]


class BuildWithConfigs(build_py):
    """Puts the configs and the scripts of the commands into a wheel, inside of the package: see `installed.folder`."""

    def run(self):
        """Copies them behind the modules; an editable install finds them where they are."""
        super().run()
        if not self.editable_mode:
            for source in (path for pattern in SHIPPED for path in HERE.glob(pattern)):
                target = Path(self.build_lib) / "fipa_jax" / source.relative_to(HERE)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(source, target)


setup(
    name="fipa_jax",
    version=VERSION.split('"')[1],
    description="Federated learning in JAX with Fisher-informed parameterwise aggregation (FIPA)",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["federated learning", "jax", "natural gradient", "Fisher information", "Gauss-Newton"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["fipa_jax", "fipa_jax.*"]),
    package_dir={"": "."},  # an editable install is then a plain path, which type checkers follow
    package_data={"fipa_jax": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={
        "console_scripts": [
            "fipa-train = fipa_jax.__main__:train",
            "fipa-summarise = fipa_jax.__main__:summarise",
            "fipa-prepare-data = fipa_jax.__main__:prepare_data",
        ]
    },
    install_requires=["jax>=0.10,<0.12", "jaxlib>=0.10,<0.12", "numpy>=2", "optax>=0.2.6"],
    extras_require={
        "experiments": EXPERIMENTS,
        "tfds": [*EXPERIMENTS, *TFDS],
        "datasets": [*EXPERIMENTS, *DATASETS],
        "tables": [*EXPERIMENTS, *TABLES],
        "tensorboard": [*EXPERIMENTS, "tensorboardX>=2.6.4"],  # writes the files; the package tensorboard shows them
        "wandb": [*EXPERIMENTS, "wandb>=0.22"],
        "mlflow": [
            *EXPERIMENTS,
            "mlflow-skinny>=3.2",
            "sqlalchemy>=2",
            "alembic>=1.10",
        ],  # with its database on the disk
        "flower": [*EXPERIMENTS, "flwr>=1.42,<1.43"],  # its interface changes from month to month; tested with 1.42.0
        "dp": [*EXPERIMENTS, "dp-accounting>=0.6"],  # counts the privacy of sampled clients; it asks for attrs below 24
        # Models of other libraries that docs/recipes trains.
        "recipes": ["dm-haiku>=0.0.14", "equinox>=0.13", "flax>=0.12"],
        "docs": ["furo>=2025.12.19", "myst-nb>=1.4", "Sphinx>=9.0.4"],  # docs/requirements.txt pins what is tested
        # What scripts/benchmark.py measures beside this package, pinned. pfl==0.6.0 and fedjax==0.0.17 ask for other
        # versions of shared packages: each needs an environment of its own.
        "peers": ["curvlinops-for-pytorch==3.0.1", "matfree==0.6.3", "scipy==1.17.1", "torch==2.15.0"],
        "test": [
            *EXPERIMENTS,
            *TFDS,
            *DATASETS,
            *TABLES,
            "chex>=0.1.90",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
        ],
        # The type checker, and what builds and reads the wheel.
        "checks": ["basedpyright==1.40.2", "build>=1.2"],
    },
)
