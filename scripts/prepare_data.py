"""Prepares a data set for training, without TensorFlow: downloads, checks and converts its official archives.

python scripts/prepare_data.py cifar10 --data-dir=DIR
python scripts/prepare_data.py heart_disease --data-dir=DIR
python scripts/prepare_data.py shakespeare --data-dir=DIR
python scripts/prepare_data.py tiny_imagenet --data-dir=DIR --manual-dir=FOLDER_WITH_THE_ARCHIVE
"""

import argparse
import sys

from absl import logging

from fipa_jax.data import client_tables
from fipa_jax.data import sources as datasets


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted([*datasets.SOURCES, *client_tables.SOURCES]))
    parser.add_argument("--data-dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument(
        "--manual-dir", default="", help="folder that holds the archives, which are then not downloaded"
    )
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)  # not the libraries' reports on what they are doing
    is_table = args.name in client_tables.SOURCES
    try:
        made = (client_tables if is_table else datasets).prepare(args.name, args.data_dir, args.manual_dir)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    images = f"--config.data.name={args.name} --config.data.dir={made.parent.parent}"
    print(f"{args.name} is in {made}: {f'--config.task.file={made}' if is_table else images}")


if __name__ == "__main__":
    main()
