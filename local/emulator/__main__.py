"""Start the emulator; the working directory gets its logs."""

import sys
from pathlib import Path


def main() -> None:
    """Change the emulator, then run it until it is stopped."""
    # Last, so that no folder of the checkout hides a package.
    sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
    from ministack import app

    from local.emulator import apis, concurrency, events, functions, machines, permissions, signed_urls, templates

    for module in (functions, concurrency, apis, events, machines, permissions, signed_urls, templates):
        module.patch()
    app.main()


if __name__ == "__main__":
    main()
