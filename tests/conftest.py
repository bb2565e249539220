"""What every test shares: timings decide nothing, so hypothesis has no deadline."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("sedac", deadline=None)
hypothesis.settings.load_profile("sedac")
