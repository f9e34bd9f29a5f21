"Bytes changed at random, and a watch over what reads them"
import contextlib, signal

import numpy as np

def mutations(data: bytes, n: int, seed=0):
    "`n` files that are not quite this one: bits flipped, bytes changed, put in, taken out, cut off, copied to another place"
    rng = np.random.default_rng(seed)
    where = lambda: min(int(rng.integers(len(data))), int(rng.integers(len(data))) if rng.random() < .5 else len(data))   # the beginning more often
    for _ in range(n):
        x, kind = bytearray(data), rng.integers(6)
        for _ in range(rng.integers(1, 4)):
            i = min(where(), max(len(x) - 1, 0))
            if kind == 0: x[i] ^= 1 << int(rng.integers(8))
            elif kind == 1: x[i] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
            elif kind == 2: x[i:i] = rng.bytes(int(rng.integers(1, 9)))
            elif kind == 3: del x[i:i + int(rng.integers(1, 9))]
            elif kind == 4: del x[i + 1:]
            else:
                k, j = int(rng.integers(1, 64)), where()
                x[i:i + k] = data[j:j + k]
            if not x: break
        yield bytes(x)

class Hangs(BaseException): pass

@contextlib.contextmanager
def within(seconds):
    "A reader that takes longer than that hangs"
    def late(*_): raise Hangs(f'longer than {seconds} s')
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

def one_sentence(error, name):
    "A message for a person: names the file, ends with a full stop at most, and is one line"
    text = str(error)
    assert name in text and '\n' not in text and 'Traceback' not in text, text
