"""The examination of a KME, or of both KMEs of a link, by ETSI GS QKD 014 V1.1.1: `qkd-kme doctor`.

`checks` are the checks, over `side` (raw requests), `tls` (raw handshakes) and `answers` (judgement; pure).
`examination` makes them all and puts a `Report` together, which `report_text` and `report_html` show.
"""

from kms_client.doctor.examination import examine
from kms_client.doctor.findings import ExaminedSide, Finding, Report, Verdict
from kms_client.doctor.side import SAECredentials, Setting, Side

__all__ = ["ExaminedSide", "Finding", "Report", "SAECredentials", "Setting", "Side", "Verdict", "examine"]
