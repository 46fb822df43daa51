# clonecluster: N machines, one IP address, one MAC address, no load balancer.
# `make demo` and `make test` do all their own set-up.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

GO       ?= go
BOARD    ?= qemu-x86_64
NODES    ?= 3
ARGS     ?=
CONFIG   ?=
CONTENT  ?=
# For hosts without Debian's source package: a kernel tree or tarball, 6.12.
KERNEL_SOURCE ?=
LOCKED   ?=
OUT      := build
# Of the Debian package: by the commit, so that it is the same wherever it is built.
VERSION  ?= $(shell git log -1 --date=format-local:%Y%m%d --format=0.1~git%cd.%h --abbrev=8 2>/dev/null)
DEB_DATE := $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),1767225600)
DEB_ARCH := $(or $(GOARCH),amd64)
CLONECTL := $(OUT)/bin/clonectl
CACHE    := $(or $(CLONECLUSTER_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/clonecluster)
KERNEL_FLAGS := --board $(BOARD) --out $(OUT)/$(BOARD) $(if $(KERNEL_SOURCE),--kernel-source $(KERNEL_SOURCE)) $(if $(LOCKED),--locked)
# Pinned (release 2026.2.2): a linter that changes by itself breaks builds by itself.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# Says at the end what was skipped, and why.
GOTESTSUM   := gotest.tools/gotestsum@v1.13.0 --format standard-quiet
# What is slow, and either the same on any datapath or tried on raw in another way.
NOT_RAW     := '^TestFigure|^TestFailover(Load|Intruders|FilteredMulticast|Rebalance)$$|^Test(CheckRefuses|KeyRoll|Strangers|JoinAndLeave|DatapathChanges|OtherRules|RestartKeepsDrain|Neighbors|Dissected|IdleCost|Leaseless)$$'
# What is tried on a cluster of nodes with different datapaths, too.
MIXED       := '^TestFailover(Join|Drain|Rebalance|Faults|Churn)$$|^TestCluster|^TestDeath$$|^TestCrash$$'
# Where "make evaluation" writes its results and its report.
EVALUATION_RESULTS ?= $(OUT)/evaluation.json
EVALUATION_OUT     ?= docs
# How many tests may find the machine too busy to judge.
MAX_BUSY    := 3

# Nothing that runs on a node, and nothing here, uses cgo (but the race detector does).
export CGO_ENABLED := 0

DEPS_BUILD := gcc libc6-dev binutils make flex bison bc libelf-dev zstd xz-utils qemu-system-x86 ca-certificates systemd-boot-efi grub-pc-bin $(if $(KERNEL_SOURCE),,linux-source-6.12)
DEPS_TEST  := $(if $(filter aarch64,$(shell uname -m)),,gcc-aarch64-linux-gnu binutils-aarch64-linux-gnu) clang llvm linux-libc-dev git iproute2 tshark curl iputils-ping iputils-arping ethtool ndisc6 procps nginx-light nftables haproxy wrk iptables sbsigntool gdisk dosfstools mtools ovmf ipxe ipxe-qemu dnsmasq-base udhcpc tftp-hpa atftp minisign qemu-system-arm qemu-efi-aarch64 keepalived chromium fonts-dejavu-core mmdebstrap prometheus rsyslog
# For boards of another architecture, whose machine is emulated.
ifneq (,$(filter %-arm64,$(BOARD)))
DEPS_BUILD += qemu-system-arm qemu-efi-aarch64 $(if $(filter aarch64,$(shell uname -m)),,gcc-aarch64-linux-gnu binutils-aarch64-linux-gnu)
endif
# What stands for them on a host without dpkg.
PROGRAMS   := gcc ld make flex bison bc zstd xz qemu-system-x86_64

##@ Use

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: BOARD=%s NODES=%s ARGS="--once --pcap demo.pcapng" CONFIG=cluster.yaml CONTENT=www\n           KERNEL_SOURCE=linux-6.12.tar.xz LOCKED=1\n' '$(BOARD)' '$(NODES)'

demo: deps image ## build everything, boot a cluster in QEMU, watch it answer on http://127.0.0.1:8080/
	@$(CLONECTL) qemu up --nodes $(NODES) --image $(OUT)/$(BOARD) $(ARGS)

image: $(CLONECTL) ## kernel + initramfs + manifest in build/BOARD
	@$(CLONECTL) image $(KERNEL_FLAGS) $(if $(CONFIG),--config $(CONFIG)) $(if $(CONTENT),--content $(CONTENT))

kernel: $(CLONECTL) ## only the patched kernel (cached; the first build takes minutes)
	@$(CLONECTL) kernel $(KERNEL_FLAGS)

deb: $(CLONECTL) ## the Debian package of cloned and clonectl for a Linux host, in build/deb (GOARCH=arm64 for that)
	@[ -n "$(VERSION)" ] || { echo "Of what version? This is no git checkout: make deb VERSION=0.1" >&2; exit 1; }
	@mkdir -p $(OUT)/deb/$(DEB_ARCH)
	@for p in cloned clonectl; do GOOS=linux GOARCH=$(DEB_ARCH) $(GO) build -trimpath -buildvcs=false -ldflags='-s -w -buildid=' -o $(OUT)/deb/$(DEB_ARCH)/$$p ./cmd/$$p; done
	@SOURCE_DATE_EPOCH=$(DEB_DATE) cmd/cloned/debian/build $(VERSION) $(DEB_ARCH) $(OUT)/deb/$(DEB_ARCH) $(CLONECTL) $(OUT)/deb

sizes: image ## table of sizes, boot times and memory, against the budgets
	@$(CLONECTL) sizes --image $(OUT)/$(BOARD) --boot --check $(ARGS)

##@ Work on it

test: deps-test image ## all tests; those that need root, namespaces or QEMU say so when they skip
	@$(CLONECTL) kernel $(KERNEL_FLAGS) --check-reproducible
	CLONECLUSTER_DATAPATH=bpf CLONECLUSTER_TEST_KERNEL=$(CURDIR)/$(OUT)/$(BOARD)/bzImage $(GO) run $(GOTESTSUM) --jsonfile $(OUT)/tests.json -- -count=1 -p 1 -timeout 40m ./...
	CLONECLUSTER_DATAPATH=raw $(GO) run $(GOTESTSUM) --jsonfile $(OUT)/tests-raw.json -- -count=1 -timeout 40m -run '^Test' -skip $(NOT_RAW) ./netcore/engine
	CLONECLUSTER_DATAPATH=mixed $(GO) run $(GOTESTSUM) --jsonfile $(OUT)/tests-mixed.json -- -count=1 -timeout 40m -run $(MIXED) ./netcore/engine
	@busy=$$(cat $(OUT)/tests*.json | grep -c 'Output":".*too busy to tell' || true); [ "$$busy" -le $(MAX_BUSY) ] || \
	  { echo "$$busy tests found this machine too busy to judge: run them again when it has less to do" >&2; exit 1; }
	CGO_ENABLED=1 $(GO) test -count=1 -p 1 -race -short -timeout 20m $(RACE)

# Not part of "make test": two more kernels are an hour on two cores.
test-boot: deps-test stub-arm ## every way to boot, on every board, whose kernels are built if they are not in the cache (an hour)
	@for board in qemu-x86_64 pc-x86_64 generic-arm64; do $(MAKE) --no-print-directory deps kernel BOARD=$$board; done
	CLONECLUSTER_TEST_KERNEL=$(CURDIR)/$(OUT)/qemu-x86_64/bzImage CLONECLUSTER_TEST_KERNEL_PC=$(CURDIR)/$(OUT)/pc-x86_64/bzImage \
	  CLONECLUSTER_TEST_KERNEL_ARM64=$(CURDIR)/$(OUT)/generic-arm64/Image $(GO) run $(GOTESTSUM) -- -count=1 -p 1 -timeout 40m ./qemu/... ./image/...

# The packages with goroutines that run without a kernel of their own.
RACE := ./config/... ./netcore/filter/... ./netcore/membership/... ./netcore/api/... ./netcore/health/... ./netcore/load/... ./qemu/vswitch/... ./qemu/nethost/... ./netcore/dhcpd/... ./image/pxe/... ./uinit/... ./cmd/internal/...

lint: ## gofmt, go vet, staticcheck
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "gofmt would change: $$out" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

# Neither is run by "go test", which would not let it take everything back at Ctrl-C.
bench-costs: deps-test ## CPU per request and per frame, against a plain host, haproxy, nginx and xt_cluster (as root, on a quiet machine; BENCH_ROUNDS=2 is short, BENCH_WAYS=raw only tells of some)
	@mkdir -p $(OUT)/bin
	$(GO) test -c -o $(OUT)/bin/bench.test ./netcore/bench
	CLONECLUSTER_BENCH=$(CURDIR) $(OUT)/bin/bench.test -test.timeout 3h -test.v -test.run '^TestBench$$'

bench-native: deps-test ## the same on the patched kernel, and behind NICs of virtio-net, in QEMU (as root; forty minutes, and a kernel build the first time)
	@$(MAKE) --no-print-directory kernel BOARD=pc-x86_64
	@mkdir -p $(OUT)/bin
	$(GO) test -c -o $(OUT)/bin/bench.test ./netcore/bench
	CLONECLUSTER_BENCH=$(CURDIR) CLONECLUSTER_BENCH_KERNEL=$(CURDIR)/$(OUT)/pc-x86_64/bzImage $(OUT)/bin/bench.test -test.timeout 3h -test.v -test.run '^TestBench(Native|Virtio)$$'

# Five minutes on each datapath; on native, whose processors are emulated, they take longer.
churn: deps-test ## cables, kills, restarts and drains under load, five minutes on each datapath (as root; half an hour to two hours, and a kernel build the first time)
	@$(MAKE) --no-print-directory kernel BOARD=pc-x86_64
	for d in bpf raw; do CLONECLUSTER_FULL=1 CLONECLUSTER_DATAPATH=$$d $(GO) test -count=1 -timeout 20m -v -run '^TestFailoverChurn$$' ./netcore/engine; done
	CLONECLUSTER_FULL=1 CLONECLUSTER_NATIVE_KERNEL=$(CURDIR)/$(OUT)/pc-x86_64/bzImage $(GO) test -count=1 -timeout 0 -v -run '^TestNative$$' ./netcore/engine

bench: ## WebStone on 1 to 4 nodes and on haproxy, nginx, xt_cluster, too few rounds to judge: into build/evaluation-short (as root; less than ten minutes)
	@EVALUATION_PLAN=short $(MAKE) --no-print-directory evaluation EVALUATION_RESULTS=$(OUT)/evaluation-short.json EVALUATION_OUT=$(OUT)/evaluation-short

evaluation: deps-test $(CLONECTL) ## the same in full, on up to 8 nodes: docs/evaluation.md (as root, on a quiet machine; less than two hours, and interrupted it goes on where it was)
	@mkdir -p $(OUT)/bin
	$(GO) test -c -o $(OUT)/bin/evaluation.test ./netcore/evaluation
	CLONECLUSTER_EVALUATION=$(CURDIR)/$(EVALUATION_RESULTS) $(OUT)/bin/evaluation.test -test.timeout 4h -test.v -test.run '^TestEvaluation$$'
	$(CLONECTL) bench --report $(EVALUATION_RESULTS) --out $(EVALUATION_OUT)

bench-go: deps-test ## benchmarks of single functions
	$(GO) test -run '^$$' -bench . -benchmem ./netcore/...

figures: deps-test ## fail-over, drain and false-failover figures at full scale (half an hour, as root, on a quiet machine)
	CLONECLUSTER_FULL=1 $(GO) test -count=1 -timeout 90m -v -run '^TestFigure' ./netcore/engine

fuzz: ## every fuzz target for FUZZTIME (10s)
	@for p in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$p/*_test.go | cut -c6-); do \
	    echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $${FUZZTIME:-10s} $$p; done; done

clean: ## remove build/; the cache outside the checkout stays
	rm -rf $(OUT)
	@echo "kernels are kept in $${CLONECLUSTER_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/clonecluster}; remove that folder to build them anew"

##@ Set-up

deps: ## install what building and the demo need, or print the one command that does
	@$(call install,$(DEPS_BUILD))

deps-test: ## the same for the tests
	@$(call install,$(DEPS_BUILD) $(DEPS_TEST))

# The stub of unified kernel images for Arm: unpacked, not installed, and apt's own lists stay as they are.
stub-arm: ## systemd's UEFI stub for arm64, into the cache (needs no root)
	@command -v apt-get >/dev/null || { echo "This is not Debian: put linuxaa64.efi.stub of systemd into $(CACHE)/stub" >&2; exit 1; }
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; cd "$$tmp"; mkdir -p lists/partial archives/partial; touch status; \
	apt() { apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User= -o Dir::State="$$tmp" -o Dir::State::status="$$tmp/status" -o Dir::Cache="$$tmp" "$$@"; }; \
	apt update; apt download systemd-boot-efi; dpkg -x systemd-boot-efi_*.deb tree; mkdir -p "$(CACHE)/stub"; \
	cp tree/usr/lib/systemd/boot/efi/linuxaa64.efi.stub "$(CACHE)/stub/"; echo "$(CACHE)/stub/linuxaa64.efi.stub"

$(CLONECTL): FORCE
	@mkdir -p $(@D)
	@GOOS= GOARCH= $(GO) build -trimpath -buildvcs=false -o $@ ./cmd/clonectl

# Only what is missing is installed. Without root or password-free sudo the command is printed.
define install
missing=""; \
command -v $(GO) >/dev/null || { echo "Go is needed, as new as go.mod says: https://go.dev/dl/" >&2; exit 1; }; \
$(GO) list -m >/dev/null || { echo "This Go ($$($(GO) env GOVERSION)) cannot build this: it takes one as new as go.mod says, https://go.dev/dl/" >&2; exit 1; }; \
if ! command -v dpkg-query >/dev/null; then \
  for p in $(PROGRAMS); do command -v $$p >/dev/null || missing="$$missing $$p"; done; \
  [ -z "$$missing" ] || { echo "This is not Debian: install what brings$$missing (and the headers of libelf), then try again." >&2; exit 1; }; \
  [ -n "$(KERNEL_SOURCE)" ] || echo "This is not Debian: give the kernel's source as KERNEL_SOURCE=linux-6.12.tar.xz if it is not found." >&2; \
  exit 0; \
fi; \
for p in $(1); do dpkg-query -W -f '$${db:Status-Abbrev}' $$p 2>/dev/null | grep -q '^ii' || missing="$$missing $$p"; done; \
[ -n "$$missing" ] || exit 0; \
cmd="apt-get install -y --no-install-recommends$$missing"; \
if [ "$$(id -u)" = 0 ]; then sudo=""; \
elif sudo -n true 2>/dev/null; then sudo="sudo"; \
else printf 'These Debian packages are missing. Install them, then try again:\n\n  sudo apt-get update && sudo %s\n\n' "$$cmd" >&2; exit 1; fi; \
echo "installing$$missing"; \
$$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive $$cmd -q \
  || { echo "If linux-source-6.12 is not to be had, get Linux 6.12 elsewhere and say: make KERNEL_SOURCE=linux-6.12.tar.xz" >&2; exit 1; }
endef

FORCE:
.PHONY: help demo image kernel deb sizes test lint bench bench-costs bench-native bench-go churn figures fuzz clean deps deps-test test-boot stub-arm evaluation FORCE
