"""The key pair of signed URLs of output files."""

import argparse
import json
import sys

from predictions.cli.stack import NotDone, Stack


def make_url_keys(stack: Stack, arguments: argparse.Namespace) -> None:
    """Puts a private key into Secrets Manager; stdout gets what `sam deploy` needs to know of it."""
    try:
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    except ImportError:
        raise NotDone("Install the package with its extra: replicate-serverless[cli].") from None
    from predictions.output_urls import PrivateKey

    # The one size that CloudFront takes.
    # https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/private-content-trusted-signers.html
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    numbers = made.private_numbers()
    name = f"{arguments.stack}/output-urls"
    secretsmanager = stack.client("secretsmanager")
    try:
        secret = secretsmanager.create_secret(
            Name=name,
            Description=f"Private key of the signed URLs of {arguments.stack}.",
            SecretString=PrivateKey(numbers.p, numbers.q, 65537).to_json(),
        )
    except secretsmanager.exceptions.ResourceExistsException:
        raise NotDone(
            f"The secret {name} exists, and the stack may sign with it. For a new pair, deploy with"
            " OutputUrls=presigned, delete that secret without recovery, and call this again."
        ) from None
    public_key = made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    parameters = {"OutputUrls": "cloudfront", "OutputUrlPublicKey": public_key, "OutputUrlSecretArn": secret["ARN"]}
    print(json.dumps(parameters, indent=2))  # which is YAML too, as `sam deploy` wants it
    print(f"The private key is in the secret {name} and nowhere else. Deploy with these parameters.", file=sys.stderr)
