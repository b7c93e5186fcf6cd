"""Make this checkout importable as `hspmn`, whatever its folder is called and whether or not it is installed."""

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("hspmn")
package.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules["hspmn"] = package
