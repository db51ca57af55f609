"""`python -m whisper_flash_attention` is `whisper-flash`."""

from whisper_flash_attention.cli import main

if __name__ == "__main__":
    main()
