/* tpm2-tss as assay-agent has it on XCP-ng 8.3: the TPM's own device and, for trials, swtpm; both without dlopen. */
#define OSSL 1
#define HAVE_EVP_SM3 1
#define HAVE_EVP_SM4_CFB 1
#define MAXLOGLEVEL 6
#define NO_DL 1
#define TCTI_DEVICE 1
#define TCTI_SWTPM 1
#define SYSCONFDIR "/etc"
