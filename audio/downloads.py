"""Downloads that appear only when they are whole."""
import hashlib
import http.client
import os
import urllib.error
import urllib.request

from tqdm import tqdm

from engine.errors import DataError
from engine.files import replacing


def download(url, path, sha256=None, instead='--source=PATH'):
    """Fetch url to path, with a progress bar; the file appears only when it is whole and of that checksum.

    instead: the option that takes the file when it was got by other means. Raises DataError.
    """
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, replacing(path, 'wb') as out:
            size = int(answer.headers.get('Content-Length') or 0)
            with tqdm(total=size or None, unit='B', unit_scale=True,
                      desc=f'downloading {os.path.basename(url)}', delay=1) as bar:
                while block := answer.read(1 << 18):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
                if size and bar.n != size:
                    raise DataError(f'{url} ended after {bar.n} of {size} bytes: run again')
            if sha256 and digest.hexdigest() != sha256:
                raise DataError(f'{url} has the checksum {digest.hexdigest()[:12]}..., not {sha256[:12]}...: another '
                                f'file than expected; if you trust one that you have, give {instead}')
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DataError(f'cannot download {url} ({error}): get it by other means and give {instead}') from None
