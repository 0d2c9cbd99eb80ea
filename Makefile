# The two commands: `make trial` goes from nothing to a running two-node
# cluster, `make test` runs every test. Both install what is missing first.

GO      ?= $(shell command -v go || echo /usr/local/go/bin/go)
# Debian's Go doesn't fetch the toolchain that go.mod names unless told to.
export GOTOOLCHAIN ?= auto
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X krgimage/configs/version.Version=$(VERSION)
export CGO_ENABLED := 0

GO_FILES := $(shell find . -name '*.go' -not -path './test/*') go.mod go.sum
EMBEDDED := initramfs/embedded

.PHONY: all build trial test unit lint e2e bench fuzz generate install clean deps

all: build

build: bin/krgimage bin/krg

# The shell script sees to Go itself too, so it runs before any use of it.
deps:
	@./.ci/deps

trial: deps
	@$(MAKE) --no-print-directory build
	./bin/krgimage trial

test: deps
	@$(MAKE) --no-print-directory build lint unit e2e

bin/krg: $(GO_FILES)
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/krg

bin/krgimage: $(GO_FILES) $(EMBEDDED)/krg $(EMBEDDED)/rescue.cpio initramfs/embedded/README
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/krgimage

$(EMBEDDED)/krg: bin/krg
	cp $< $@

# u-root's commands take a minute to compile, so the archive is made again only
# when the list of them (the tool lines of go.mod) or their versions change. The
# tag gives gosh its plain line input: the other one waits for answers of a
# terminal emulator, which a serial line does not give.
$(EMBEDDED)/rescue.cpio: go.mod
	$(GO) tool mkuimage -o $@.tmp -base=/dev/null -initcmd= -defaultsh=gosh -go-build-tags=goshsmall $$($(GO) list tool | grep u-root/cmds)
	mv $@.tmp $@

lint: build
	@test -z "$$(gofmt -l cmd configs images initramfs node nfsroot pxe services test)" || { gofmt -l cmd configs images initramfs node nfsroot pxe services test; echo "gofmt: the files above want formatting"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# Unit tests run the fuzzers' seeds too.
unit: build
	$(GO) test ./cmd/... ./configs/... ./images/... ./initramfs/... ./node/... ./nfsroot/... ./pxe/... ./services/...

e2e: build
	$(GO) test -count=1 -timeout 35m -v ./test/...

bench: deps
	@$(MAKE) --no-print-directory build
	$(GO) test -count=1 -timeout 120m -run '^$$' -bench . -benchtime 1x ./test
	$(GO) test -count=1 -run '^$$' -bench . ./services/link

# Each fuzzer for FUZZTIME, one after the other.
FUZZTIME ?= 30s
fuzz: build
	@for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg 2>/dev/null | grep ^Fuzz); do \
	    echo "== $$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$pkg || exit 1; \
	  done; done

# Files that are made from the code and committed: schema, golden help texts,
# and the cluster's protocol (Debian package protobuf-compiler).
generate: build
	$(GO) generate ./services/...
	$(GO) test ./configs/... ./cmd/... -run 'Schema|Golden' -update

PREFIX ?= /usr/local
install: build
	install -D -m 755 bin/krgimage $(DESTDIR)$(PREFIX)/bin/krgimage
	./bin/krgimage man --dir $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	./bin/krgimage completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/krgimage

clean:
	rm -rf bin $(EMBEDDED)/krg $(EMBEDDED)/rescue.cpio
