"""Run one Cog server in the current folder, and stop it with its parent process.

Started by `local.replicate.cog_servers` as a script, so that a killed front leaves no process behind.
Arguments: port, upload URL, folder for temporary files, and `train` for a server that trains.
"""

import os
import signal
import sys
import threading
import time

import coglet


def end_with(parent: int) -> None:
    """Stop within half a second after `parent` has ended; Cog then stops its worker."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    port, upload_url, temporary, *rest = sys.argv[1:]
    trains = rest == ["train"]
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    coglet.server.serve(
        predictor_ref="train.py:train" if trains else "predict.py:Predictor",
        is_train=trains,
        host="127.0.0.1",
        port=int(port),
        upload_url=upload_url,
        output_temp_dir_base=temporary,
    )
