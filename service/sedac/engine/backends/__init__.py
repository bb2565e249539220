"""The forms of the computing itself: torch everywhere, C++ on a CPU, Triton on a GPU."""
