"""Compile the native ops once, keep them in the user's cache, and load them; or say in one sentence why not"""
import hashlib, os, platform, shlex, shutil, subprocess, sys, tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
import torch

SOURCES = Path(__file__).parent / 'csrc'


class BuildError(RuntimeError):
    "Why there is no library, in a sentence."


def cache_folder() -> Path:
    "Where compiled ops are kept; MASKRCNN_EDU_CACHE moves it."
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return Path(os.environ.get('MASKRCNN_EDU_CACHE') or base / 'maskrcnn_edu') / 'ops'


def find_compiler(
    variable: str,   # of the environment that may name it
    *names: str,     # tried in this order
) -> str:            # path
    "A compiler on PATH."
    named = os.environ.get(variable)
    for name in [named] if named else names:
        if path := shutil.which(name): return path
    raise BuildError(f'no compiler found ({variable}={named} is not there)' if named else f'no compiler found on PATH (looked for {", ".join(names)})')


@cache
def processor() -> str:
    "What -march=native depends on."
    try: lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    except OSError: return platform.processor() or platform.machine()
    return '\n'.join(l for l in lines if l.startswith(('model name', 'flags', 'Features', 'CPU part')))


def torch_flags() -> list[str]:
    "Where torch's headers and libraries are."
    root = Path(torch.__file__).parent
    return [f'-I{root}/include', f'-I{root}/include/torch/csrc/api/include', f'-L{root}/lib', '-ltorch_cpu', '-ltorch']


def cpp_command() -> list[str]:
    "The call that compiles the ops for this processor, without its output."
    compiler = find_compiler('CXX', 'c++', 'g++', 'clang++')
    system = ['-undefined', 'dynamic_lookup'] if sys.platform == 'darwin' else []
    return [compiler, '-std=c++20', '-O2', '-march=native', '-fPIC', '-shared', '-Wno-psabi', *system, str(SOURCES / 'cpu.cpp'), *torch_flags()]


def cuda_command(
    architectures=None,   # compute capabilities, such as ('80', '90'); that of the GPU present if not given
) -> list[str]:
    "The call that compiles the ops for an NVIDIA GPU, without its output."
    compiler = find_compiler('NVCC', 'nvcc', str(Path(os.environ.get('CUDA_HOME', '/usr/local/cuda')) / 'bin' / 'nvcc'))
    if architectures is None: architectures = ['%d%d' % torch.cuda.get_device_capability()]
    code = [f'-gencode=arch=compute_{a},code=sm_{a}' for a in architectures]
    return [compiler, '-std=c++20', '-O3', '-DUSE_CUDA', '--expt-relaxed-constexpr', '--expt-extended-lambda', *code,
            '-Xcompiler', '-fPIC', '-shared', str(SOURCES / 'cuda.cu'), *torch_flags(), '-ltorch_cuda']


def key(
    command: list[str],
) -> str:            # the same for the same source, torch, compiler, flags and processor
    "Name of what a command makes."
    compiler = Path(command[0]).resolve()
    about = compiler.stat()
    parts = [torch.__version__, sys.platform, processor(), *command, str(compiler), about.st_size, about.st_mtime_ns]
    digest = hashlib.sha256('\0'.join(map(str, parts)).encode())
    for file in sorted(SOURCES.iterdir()): digest.update(file.name.encode() + b'\0' + file.read_bytes())
    return digest.hexdigest()[:16]


def find(
    name: str,       # of the library, with its key
    folder: Path,
) -> Path | None:
    "A whole library in the cache. Its name ends with a hash of its bytes, so that a damaged one is not run."
    for file in sorted(folder.glob(f'{name}-*.so')):
        if hashlib.sha256(file.read_bytes()).hexdigest()[:16] == file.stem.rpartition('-')[2]: return file


def without_native(command: list[str]) -> list[str]:
    "The same call for any processor of this kind."
    return [c for c in command if c != '-march=native']


def compile(
    command: list[str],
    name: str,
    folder: Path,
) -> Path:
    "Run the compiler and put the library into the folder in one move."
    part = Path(tempfile.mkdtemp(dir=folder, prefix='.build-'))
    try:
        for attempt in dict.fromkeys([tuple(command), tuple(without_native(command))]):
            done = subprocess.run([*attempt, '-o', str(part / 'ops.so')], capture_output=True, text=True)
            if done.returncode == 0: break
        else:
            log = folder / f'{name}.log'
            log.write_text(shlex.join(command) + '\n' + done.stdout + done.stderr)
            first = next((l for l in done.stderr.splitlines() if 'error' in l), f'exit status {done.returncode}')
            raise BuildError(f'{command[0]} failed: {first.strip()} (all of it is in {log})')
        content = (part / 'ops.so').read_bytes()
        file = folder / f'{name}-{hashlib.sha256(content).hexdigest()[:16]}.so'
        os.replace(part / 'ops.so', file)
        return file
    finally: shutil.rmtree(part, ignore_errors=True)


@contextmanager
def lock(file: Path):
    "One process at a time; a lock ends with its process, however that ends."
    import fcntl
    with open(file, 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def build(
    kind: str,       # cpp or cuda
) -> Path:           # the library
    "The library for this machine, compiled if it is not in the cache. Raises BuildError."
    command = cpp_command() if kind == 'cpp' else cuda_command()
    folder, name = cache_folder(), f'{kind}-{key(command)}'
    if file := find(name, folder): return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f'{name}.lock'):
            return find(name, folder) or compile(command, name, folder)   # another process may have been first
    except OSError as e: raise BuildError(f'the cache folder {folder} cannot be written ({e.strerror or e}); set MASKRCNN_EDU_CACHE to one that can') from None
    except ImportError: raise BuildError('this system has no file locks') from None


def load(kind: str):
    "Make the ops of one kind known to torch. Raises BuildError."
    file = build(kind)
    try: torch.ops.load_library(str(file))
    except OSError as e: raise BuildError(f'{file} cannot be loaded ({e}); delete it') from None
