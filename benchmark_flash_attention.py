"""The benchmark under the name by which people know it: `whisper-flash benchmark`."""

import sys

from whisper_flash_attention.cli import app

if __name__ == "__main__":
    app(args=["benchmark", *sys.argv[1:]], prog_name="whisper-flash")
