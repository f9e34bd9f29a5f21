"Reads settings.ini, the one place for the package's metadata."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
meta = config['DEFAULT']
lines = lambda key: meta[key].split('\n')[1:]   # an indented list starts on the line after its key
readme = here/'README.md'

setup(
    name=meta['lib_name'], version=meta['version'], description=meta['description'],
    keywords=meta['keywords'].split(), license=meta['license'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    python_requires='>=' + meta['min_python'],
    install_requires=lines('requirements'),
    extras_require={'dev': lines('dev_requirements')},
    packages=find_packages(include=[meta['lib_name'], meta['lib_name'] + '.*']),
    package_data={meta['lib_name']: ['*.svg', 'weights/*.safetensors', 'cuda/csrc/*']},
    entry_points={'console_scripts': [meta['console_scripts']],
                  'nbdev': [f"{meta['lib_name']}={meta['lib_name']}._modidx:d"]},
    zip_safe=False)
