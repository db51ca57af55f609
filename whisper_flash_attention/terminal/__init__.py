"""What people see in a terminal: printable forms of text that comes from elsewhere.

It stands below the commands and above nothing else: it knows no recordings, models or options, and
every other part of the package may import it.
"""

from whisper_flash_attention.terminal.printable import json_line, print_line, printable

__all__ = ["json_line", "print_line", "printable"]
