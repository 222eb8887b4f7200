"""The stored documents of format 1: frozen models, their JSON shapes, validation and codec. No I/O.

========================  =====================================================================
document                  what it says
========================  =====================================================================
`BuildPlan`               what a build is going to do; read first by a resumed build
`ModelRecord`             what training has written
`ShardRecord`             what one shard task has written, and the rows it covers
`Manifest`                what a generation consists of
`Pointer`                 which generation of an index is current; kept in the dataset's metadata
`LeaseDocument`           until when a builder works on a generation
`BuildReport`             what a build took; nothing depends on it
========================  =====================================================================

`encode` writes any of them, ``decode_...`` reads one kind. Both validate: a document that breaks its
schema or an invariant is neither written nor read, and the error lists all that is wrong with it.
"""

from __future__ import annotations

from .build_plan import BuildPlan, BuildPlanJSON, DatasetEntry, DatasetEntryJSON, ShardTask, ShardTaskJSON
from .cover import (
    Cover,
    CoverJSON,
    FragmentCover,
    FragmentCoverJSON,
    FragmentSignature,
    FragmentSignatureJSON,
    Remap,
    RemapJSON,
    RemapTarget,
    RemapTargetJSON,
)
from .documents import (
    Document,
    decode_lease,
    decode_manifest,
    decode_model_record,
    decode_plan,
    decode_pointer,
    decode_report,
    decode_shard_record,
    encode,
)
from .files import FileEntry, FileEntryJSON, Reference, ReferenceJSON, root_digest
from .lease import LeaseDocument, LeaseDocumentJSON
from .manifest import (
    BuildStatistics,
    BuildStatisticsJSON,
    Manifest,
    ManifestJSON,
    ModelEntry,
    ModelEntryJSON,
    RecallPoint,
    RecallPointJSON,
    RecallReport,
    RecallReportJSON,
    ShardEntry,
    ShardEntryJSON,
)
from .options import ResolvedSpecJSON, SearchOptionsJSON
from .pointer import Pointer, PointerJSON
from .records import (
    Fingerprint,
    FingerprintJSON,
    ModelRecord,
    ModelRecordJSON,
    ShardRecord,
    ShardRecordJSON,
    SkipCounts,
    SkipCountsJSON,
    check_cover_disjoint,
)
from .report import BuildReport, BuildReportJSON, PhaseReport, PhaseReportJSON, TaskReport, TaskReportJSON
from .runs import RunTable, RunTableJSON

__all__ = [
    "BuildPlan",
    "BuildPlanJSON",
    "BuildReport",
    "BuildReportJSON",
    "BuildStatistics",
    "BuildStatisticsJSON",
    "Cover",
    "CoverJSON",
    "DatasetEntry",
    "DatasetEntryJSON",
    "Document",
    "FileEntry",
    "FileEntryJSON",
    "Fingerprint",
    "FingerprintJSON",
    "FragmentCover",
    "FragmentCoverJSON",
    "FragmentSignature",
    "FragmentSignatureJSON",
    "LeaseDocument",
    "LeaseDocumentJSON",
    "Manifest",
    "ManifestJSON",
    "ModelEntry",
    "ModelEntryJSON",
    "ModelRecord",
    "ModelRecordJSON",
    "PhaseReport",
    "PhaseReportJSON",
    "Pointer",
    "PointerJSON",
    "RecallPoint",
    "RecallPointJSON",
    "RecallReport",
    "RecallReportJSON",
    "Reference",
    "ReferenceJSON",
    "Remap",
    "RemapJSON",
    "RemapTarget",
    "RemapTargetJSON",
    "ResolvedSpecJSON",
    "RunTable",
    "RunTableJSON",
    "SearchOptionsJSON",
    "ShardEntry",
    "ShardEntryJSON",
    "ShardRecord",
    "ShardRecordJSON",
    "ShardTask",
    "ShardTaskJSON",
    "SkipCounts",
    "SkipCountsJSON",
    "TaskReport",
    "TaskReportJSON",
    "check_cover_disjoint",
    "decode_lease",
    "decode_manifest",
    "decode_model_record",
    "decode_plan",
    "decode_pointer",
    "decode_report",
    "decode_shard_record",
    "encode",
    "root_digest",
]
