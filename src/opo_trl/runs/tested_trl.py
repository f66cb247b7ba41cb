"""Which TRL the package is tested with, checked where TRL is first used."""

import logging
import os
from importlib.metadata import version

TESTED_TRL = ("1.16",)  # minor releases, the ones that pyproject.toml admits
ALLOW_UNTESTED = "OPO_ALLOW_UNTESTED_TRL"  # set by `make test-trl`

logger = logging.getLogger(__name__)


def check_trl() -> None:
    """
    Refuse a TRL of a minor release that was not tested, as `pip install --no-deps` can leave it.

    Raises:
        ImportError: With the tested release, the installed one and how to fix it, unless `OPO_ALLOW_UNTESTED_TRL=1`.
    """
    installed = version("trl")
    if ".".join(installed.split(".")[:2]) in TESTED_TRL:
        return
    problem = (
        f"opo-trl is tested with TRL {', '.join(TESTED_TRL)}, got TRL {installed}. It overrides private methods of "
        "GRPOTrainer, which change between minor releases. Install a tested release with "
        f"`pip install 'trl=={TESTED_TRL[-1]}.*'`."
    )
    if os.environ.get(ALLOW_UNTESTED) != "1":
        raise ImportError(
            f"{problem} To test another one, run `make test-trl TRL={installed}` in a checkout of opo-trl (see "
            f"docs/maintaining.md); {ALLOW_UNTESTED}=1 turns this error into a warning."
        )
    logger.warning("%s %s=1 is set, so this is not an error.", problem, ALLOW_UNTESTED)
