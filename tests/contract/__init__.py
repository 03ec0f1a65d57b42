"""One suite for every data plane, told in the protocols of ``imgstorage.core.ports``."""

import pytest

pytest.register_assert_rewrite("tests.contract.container_fixtures")
