"""What Ray says if cluster and driver do not have the same release, in one line with a remedy."""

from __future__ import annotations

import re

MISMATCH = re.compile(r"Version mismatch:.*?Ray: (\S+)\s+Python: (\S+).*?Ray: (\S+)\s+Python: (\S+)", re.DOTALL)


def version_mismatch(error: BaseException) -> str | None:
    """Both versions and what to do, if an error of `ray.init` is about them; else None."""
    found = MISMATCH.search(str(error))
    if found is None:
        return None
    cluster, cluster_python, here, python = found.groups()
    return (
        f"the cluster runs Ray {cluster} with Python {cluster_python}, and here is Ray {here} with Python {python}; "
        "release of Ray and minor version of Python have to be the same: "
        f"install 'ray[default]=={cluster}' here, or start the cluster with Ray {here}"
    )
