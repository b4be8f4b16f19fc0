"""Command that makes the key pair for signed URLs of output files."""

import json
import sys

from predictions.cli.stack import NotDone, Stack, command, group

app = group("Make the key pair for signed URLs of output files.")


@command(app, "keys", example="urls keys --stack NAME > keys.yaml")
def make_url_keys(stack: Stack) -> None:
    """Store a new private key in Secrets Manager.

    The parameters for `sam deploy` are printed to stdout.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    except ImportError:
        raise NotDone("Install the package with its extra: replicate-serverless[cli].") from None
    from predictions.files.signed_urls import PrivateKey

    # The only size that CloudFront accepts.
    # https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/private-content-trusted-signers.html
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    numbers = made.private_numbers()
    name = f"{stack.name}/output-urls"
    secretsmanager = stack.client("secretsmanager")
    try:
        secret = secretsmanager.create_secret(
            Name=name,
            Description=f"Private key of the signed URLs of {stack.name}.",
            SecretString=PrivateKey(numbers.p, numbers.q, 65537).to_json(),
        )
    except secretsmanager.exceptions.ResourceExistsException:
        raise NotDone(
            f"The secret {name} exists, and the stack may sign with it. For a new key pair, deploy with"
            " OutputUrls=presigned, delete that secret without recovery, and run this command again."
        ) from None
    public_key = made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    parameters = {"OutputUrls": "cloudfront", "OutputUrlPublicKey": public_key, "OutputUrlSecretArn": secret["ARN"]}
    print(json.dumps(parameters, indent=2))  # JSON is YAML too, which `sam deploy` reads
    print(f"The private key is stored only in the secret {name}. Deploy with these parameters.", file=sys.stderr)
