"""Makes a wide twin of a small MoE: `python training/widen.py SRC DST --hidden 4 --experts 8`.

The work is done by `understudy.widen`; it lives in the package because `understudy demo` needs it.
"""

from understudy.widen import main, twin_bytes, widen

__all__ = ["main", "twin_bytes", "widen"]

if __name__ == "__main__":
    main()
