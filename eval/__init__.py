"""What the papers measure, as programs."""

import functools
import os
import sys


def program(main):
    """`main` of an eval program: Ctrl-C, and a file that cannot be read or written, are one line each."""

    @functools.wraps(main)
    def told(argv=None):
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\nended by SIGINT; what was written is kept", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename} cannot be read or written: {error.strerror}", file=sys.stderr)
            raise SystemExit(2) from None

    return told
