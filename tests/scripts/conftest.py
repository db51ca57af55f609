"""The scripts' models are as small as those of the package's benchmark."""

from tests.benchmark.conftest import one_thread as one_thread
