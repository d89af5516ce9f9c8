/*
 * swtpm's part of tpm2-tss beside the one for the TPM's device, in one archive: as libraries apart, each calls its own description by
 * this one name.
 */
#define Tss2_Tcti_Info Tss2_Tcti_Swtpm_Info
#include "src/tss2-tcti/tcti-swtpm.c"
