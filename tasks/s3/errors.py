"""What the errors of a store, and of boto3, mean for a dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from protocols.s3.checksums import Mismatch
from protocols.s3.error import StoreError
from protocols.s3.probe import Corrupts
from protocols.s3.upload import Gone
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Rejected, Unreachable

# "List of error codes", Amazon S3 API reference. What is not here goes by its status.
CODES: dict[str, type[DispatchError]] = {
    "AccessDenied": Denied,
    "AccountProblem": Denied,
    "AllAccessDisabled": Denied,
    "ExpiredToken": Denied,
    "InvalidAccessKeyId": Denied,
    "InvalidSecurity": Denied,
    "InvalidToken": Denied,
    "NotSignedUp": Denied,
    "RequestTimeTooSkewed": Denied,
    "SignatureDoesNotMatch": Denied,
    "TokenRefreshRequired": Denied,
    "NoSuchBucket": NotFound,
    "NoSuchUpload": Interrupted,
    "AuthorizationHeaderMalformed": Misconfigured,
    "IllegalLocationConstraintException": Misconfigured,
    "InvalidBucketName": Misconfigured,
    "InvalidEncryptionAlgorithmError": Misconfigured,
    "InvalidRequest": Misconfigured,
    "InvalidStorageClass": Misconfigured,
    "KMS.DisabledException": Misconfigured,
    "KMS.InvalidStateException": Misconfigured,
    "KMS.NotFoundException": Misconfigured,
    "PermanentRedirect": Misconfigured,
    "EntityTooLarge": Rejected,
    "EntityTooSmall": Rejected,
    "InvalidArgument": Rejected,
    "InvalidObjectName": Rejected,
    "InvalidURI": Rejected,
    "KeyTooLongError": Rejected,
    "MetadataTooLarge": Rejected,
    "XMinioInvalidObjectName": Rejected,
}
STATUS: dict[int, type[DispatchError]] = {
    301: Misconfigured,
    307: Busy,  # a new bucket, whose name has not got around yet
    401: Denied,
    403: Denied,
    404: NotFound,
    405: Misconfigured,
    411: Misconfigured,
    501: Misconfigured,
}
# Who we are is not accepted, whatever it is that we ask for.
CREDENTIALS = frozenset((
    "ExpiredToken", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "NotSignedUp", "RequestTimeTooSkewed",
    "SignatureDoesNotMatch", "TokenRefreshRequired", "Unauthorized",
))  # fmt: skip
REMEDIES = {
    "AccessDenied": "the key must be allowed to list the bucket and to put objects into it",
    "AuthorizationHeaderMalformed": "correct region",
    "ExpiredToken": "renew session_token",
    "Forbidden": "the key must be allowed to list the bucket and to put objects into it",
    "InvalidAccessKeyId": "correct access_key_id",
    "InvalidBucketName": "correct bucket",
    "InvalidEncryptionAlgorithmError": "correct sse",
    "InvalidRequest": "see checksum, sse and storage_class",
    "InvalidStorageClass": "correct storage_class",
    "InvalidToken": "correct session_token",
    "KMS.NotFoundException": "correct kms_key_id",
    "NoSuchBucket": "make the bucket, or correct bucket and endpoint_url",
    "NotFound": "make the bucket, or correct bucket and endpoint_url",
    "PermanentRedirect": "correct region or endpoint_url",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "SignatureDoesNotMatch": "correct secret_access_key",
}
# The most specific ones first.
FOREIGN: tuple[tuple[type[Exception], type[DispatchError], str], ...] = (
    (boto.NoCredentialsError, Misconfigured, "no credentials: set access_key_id and secret_access_key, or profile"),
    (boto.PartialCredentialsError, Misconfigured, "half of the credentials is missing"),
    (boto.ProfileNotFound, Misconfigured, "correct profile"),
    (boto.ConfigParseError, Misconfigured, "the worker's AWS configuration can't be read"),
    (boto.ConfigNotFound, Misconfigured, "the worker's AWS configuration can't be read"),
    (boto.InvalidConfigError, Misconfigured, "the worker's AWS configuration is wrong"),
    (boto.TokenRetrievalError, Denied, "the worker must log in again"),
    (boto.SSOError, Denied, "the worker must log in again"),
    (boto.CredentialRetrievalError, Denied, "the credentials can't be had"),
    (boto.NoRegionError, Misconfigured, "set region"),
    (boto.InvalidRegionError, Misconfigured, "correct region"),
    (boto.ParamValidationError, Misconfigured, "correct bucket"),
    (boto.InvalidS3AddressingStyleError, Misconfigured, "correct addressing_style"),
    (boto.UnsupportedS3ConfigurationError, Misconfigured, "see bucket, region and endpoint_url"),
    (boto.EndpointResolutionError, Misconfigured, "see bucket, region and endpoint_url"),
    (ResponseParserError, Misconfigured, "what answers there is not an S3 store: correct endpoint_url"),
    (boto.ClientError, Denied, "the credentials can't be had"),  # of the service that gives them
    (boto.HTTPClientError, Unreachable, "the service that gives credentials can't be reached"),
    (Gone, Interrupted, "the store has lost the upload"),
)


@contextmanager
def errors(where: str, item: str | None = None) -> Iterator[None]:
    """Turn what is raised inside into our own errors; a Mismatch stays one.

    Args:
        where: server and bucket, for messages.
        item: what is being sent, if its refusal concerns nothing else.
    """
    try:
        yield
    except StoreError as exc:
        if exc.mismatch:
            raise Mismatch(str(exc)) from exc
        raise of(exc, where, item) from exc
    except Corrupts as exc:
        raise Misconfigured(f"{where}: the store does not keep what was sent to it: {exc}") from exc
    except tuple(kind for kind, _, _ in FOREIGN) as exc:
        kind, remedy = next((ours, remedy) for theirs, ours, remedy in FOREIGN if isinstance(exc, theirs))
        raise kind(f"{where}: {_sentence(exc)}: {remedy}", item=item) from exc


def of(exc: StoreError, where: str, item: str | None = None) -> DispatchError:
    """Return a store's refusal as one of our errors."""
    remedy = REMEDIES.get(exc.code)
    message = f"{where}: {exc}" + (f": {remedy}" if remedy else "")
    if exc.busy:
        return Busy(message, retry_after=exc.retry_after)
    kind = CODES.get(exc.code) or STATUS.get(exc.status, Rejected)
    if kind is Rejected:
        return Rejected(str(exc), item=item) if item is not None else Misconfigured(message)
    return kind(message)


def only_denied(exc: StoreError) -> bool:
    """Return True if the key may not do this one operation."""
    return exc.status == 403 and exc.code not in CREDENTIALS


def _sentence(exc: Exception) -> str:
    return " ".join(str(exc).split()).rstrip(".") or type(exc).__name__
