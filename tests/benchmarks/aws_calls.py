"""What functions ask of AWS, counted between them and the local cloud.

Each function gets an endpoint of its own, on loopback, that passes everything on as it is; so a call is known by the
function that made it, and the product needs no hook. The functions' clients take the endpoint from `AWS_ENDPOINT_URL`.
"""

import http.client
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from local.cloud import LocalCloud

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_S3 = {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}
_WRITES = {"PutItem", "UpdateItem", "DeleteItem"}
_DYNAMODB_KIB = 1024


@dataclass(frozen=True)
class Call:
    """One request to AWS.

    Attributes:
        function: Who made it, by its folder's name.
        service: As in the signature: `dynamodb`, `s3`, `states`, ….
        operation: As in AWS's API reference: `PutItem`.
        status: Of the answer, 200 for instance.
        error: The error's name, `ConditionalCheckFailedException` for instance; empty for a success.
        read_units: DynamoDB read units, by the length of the answer (its JSON is a little longer than the items).
    """

    function: str
    service: str
    operation: str
    status: int
    error: str
    read_units: float = 0.0

    @property
    def writes(self) -> bool:
        """Whether it writes an item, or tried to: a write whose condition did not hold is billed too."""
        return self.service == "dynamodb" and self.operation in _WRITES


class Calls(list[Call]):
    """All calls so far; appended to while functions run."""


@contextmanager
def recorded(cloud: LocalCloud, functions: Mapping[str, str]) -> Iterator[Calls]:
    """Record every call that these functions make from now on. Their next invocations are cold starts.

    Args:
        cloud: Where they are deployed.
        functions: Their physical names, by the names under which calls are recorded.
    """
    calls = Calls()
    with ExitStack() as stack:
        for function, deployed in functions.items():
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(function, cloud.endpoint_url, calls))
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            _use(cloud, deployed, f"http://127.0.0.1:{server.server_port}")
        yield calls


def _use(cloud: LocalCloud, name: str, endpoint_url: str) -> None:
    client = cloud.client("lambda")
    variables = client.get_function_configuration(FunctionName=name)["Environment"]["Variables"]
    environment = {"Variables": {**variables, "AWS_ENDPOINT_URL": endpoint_url}}
    client.update_function_configuration(FunctionName=name, Environment=environment)


def _handler(function_name: str, endpoint_url: str, calls: Calls) -> type[BaseHTTPRequestHandler]:
    class PassOn(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def pass_on(self) -> None:
            body = self._body()
            # The host too: the signature is for it.
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            # A connection of its own for each: the emulator closes one that is idle for seconds.
            with closing(http.client.HTTPConnection(urlsplit(endpoint_url).netloc, timeout=60)) as upstream:
                upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
                answer = upstream.getresponse()
                content = answer.read()
            calls.append(_call(function_name, self, body, answer, content))
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815  # http.server looks for these

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(chunks)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the overridden method's name for it
            pass

    return PassOn


def _call(
    function: str, request: BaseHTTPRequestHandler, body: bytes, answer: http.client.HTTPResponse, content: bytes
) -> Call:
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-signing-elements.html
    scope = re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/", request.headers.get("Authorization", ""))
    service = scope[1] if scope else "unsigned"
    error = "" if answer.status < 400 else _error(content) or str(answer.status)
    if service == "s3":
        return Call(function, service, _s3_operation(request), answer.status, error)
    operation = request.headers.get("X-Amz-Target", request.path).rpartition(".")[2].rpartition("/")[2]
    units = _read_units(operation, body, content) if service == "dynamodb" and not error else 0.0
    return Call(function, service, operation, answer.status, error, units)


def _error(content: bytes) -> str:
    try:
        return str(json.loads(content).get("__type", "")).rpartition("#")[2]
    except ValueError:
        found = re.search(rb"<Code>(\w+)</Code>", content)
        return found[1].decode() if found else ""


def _s3_operation(request: BaseHTTPRequestHandler) -> str:
    query = parse_qs(urlsplit(request.path).query, keep_blank_values=True)
    match request.command:
        case "POST" if "uploads" in query:
            return "CreateMultipartUpload"
        case "POST" if "uploadId" in query:
            return "CompleteMultipartUpload"
        case "PUT" if "partNumber" in query:
            return "UploadPart"
        case "DELETE" if "uploadId" in query:
            return "AbortMultipartUpload"
    return _S3.get(request.command, request.command)


def _read_units(operation: str, body: bytes, content: bytes) -> float:
    """4 KB each, half of one without `ConsistentRead`.

    https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/read-write-operations.html
    """
    request, answer = json.loads(body), json.loads(content)
    match operation:
        case "GetItem":
            read = [answer.get("Item", {})]
            consistent = request.get("ConsistentRead", False)
        case "Query":
            read = [answer.get("Items", [])]
            consistent = request.get("ConsistentRead", False)
        case "BatchGetItem":
            read = [item for items in answer.get("Responses", {}).values() for item in items]
            consistent = any(each.get("ConsistentRead", False) for each in request["RequestItems"].values())
        case _:
            return 0.0
    units = sum(max(1, math.ceil(len(json.dumps(each)) / (4 * _DYNAMODB_KIB))) for each in read)
    return units if consistent else units / 2
