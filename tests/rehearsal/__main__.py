# SPDX-License-Identifier: MIT
"""Numbers of parts as JSON, one line each: `python -m rehearsal '["decode", {"batch": 4}]' ...`"""

import json
import sys

from rehearsal.parts import PARTS

for call in sys.argv[1:]:
    name, given = json.loads(call)
    print(json.dumps(PARTS[name](**given)), flush=True)
