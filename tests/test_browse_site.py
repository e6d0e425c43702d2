"""The site's check in a browser, with a browser that behaves badly."""

import sys
import tempfile

from tools import browse_site

# It reports, and leaves a helper that still writes into its folder.
BROWSER = """#!{python}
import pathlib, subprocess, sys, urllib.request
folder, = (x.partition("=")[2] for x in sys.argv if x.startswith("--user-data-dir="))
helper = '''
import pathlib, sys
folder = pathlib.Path(sys.argv[1]) / "Default"
folder.mkdir()
try:
  for number in range(20000):
    (folder / str(number)).touch()
except OSError:
  pass  # deleted at last
'''
subprocess.Popen([sys.executable, "-c", helper, folder])
while not (pathlib.Path(folder) / "Default/3000").exists():
  pass  # what takes a while to delete is written to meanwhile
address = sys.argv[-1].removesuffix("/check")
urllib.request.urlopen(address + "/report", data=b'{{"pages": [], "searches": []}}')
"""


def test_a_helper_may_outlive_its_browser(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  browser = tmp_path / "browser"
  browser.write_text(BROWSER.format(python=sys.executable))
  browser.chmod(0o755)
  report = browse_site.visit(str(browser), tmp_path)
  assert report == {"pages": [], "searches": []}
