"""Are the runs of two checkouts the same to the bit? See harness/same_bits.py.

python scripts/same_bits.py record FILE [--checkout=DIR] [--data-dir=DIR] [--only=NAME,NAME]
python scripts/same_bits.py compare FILE FILE
"""

import argparse
import json
import sys
from pathlib import Path

from harness import same_bits

HERE = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path, help="one to record, two to compare")
    parser.add_argument("--checkout", type=Path, default=HERE, help="whose code is run; by default this one")
    parser.add_argument("--data-dir", default="", help="where CIFAR-10 is")
    parser.add_argument("--only", default="", help="names of cases")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    args = parser.parse_args()
    if args.command == "compare":
        sys.exit(same_bits.compare(*(json.loads(file.read_text()) for file in args.files)))
    records = same_bits.record(args.checkout, args.data_dir, [*filter(None, args.only.split(","))], args.jobs)
    args.files[0].write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
