"""What every run of the demo must show: AdamW gains reward and pays for it. Nothing here favours a method."""

import json
import sys
from pathlib import Path

results = json.loads(Path(sys.argv[1]).read_text())
reference = results["reference"]
adamw = [point for point in results["points"] if point["method"] == "AdamW"]
gained = [(point["reward"] - reference["reward"], point["tax"]) for point in adamw]
for gain, tax in gained:
    print(f"AdamW: reward {100 * gain:+.1f} points, tax {100 * tax:.1f} points")
if not any(gain >= 0.30 and tax >= 0.08 for gain, tax in gained):
    sys.exit("the demo must show AdamW gaining at least 30 points of sampled reward at a tax of at least 8")
for point in results["points"]:
    low, high = point["capability_ci"]
    if not (0 <= low <= point["capability"] <= high <= 1):
        sys.exit(f"capability and interval of {point['method']} do not fit: {point}")
