"""The template as `sam build` wrote it for the deployed stack."""

import yaml

from local.cloud import CHECKOUT, LocalCloud
from tests.support.template import load_template


def test_built_template_has_no_alias_or_merge_which_cloudformation_refuses(cloud: LocalCloud) -> None:
    source, built = (CHECKOUT / "template.yaml").read_text(), cloud._build.template.read_text()
    assert [token for token in yaml.scan(source) if isinstance(token, yaml.AliasToken)], "none to expand"
    assert not [token for token in yaml.scan(built) if isinstance(token, (yaml.AliasToken, yaml.AnchorToken))]
    assert "<<:" not in built
    for name in load_template()["Resources"]:
        assert f"\n  {name}:\n" in built
