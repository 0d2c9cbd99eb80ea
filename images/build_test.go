package images

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/images/progress"
)

// fakeSource makes small Debian parts and counts how often it was asked.
type fakeSource struct {
	calls map[string]int
	fail  map[string]error
	epoch string // content that changes when the "mirror" does
}

func newFakeSource() *fakeSource {
	return &fakeSource{calls: map[string]int{}, fail: map[string]error{}, epoch: "1"}
}

func (s *fakeSource) Inputs() any { return "fake" }

func (s *fakeSource) Base(_ context.Context, dst string, _ *progress.Step) ([]Package, error) {
	s.calls["packages"]++
	if err := s.fail["packages"]; err != nil {
		return nil, err
	}
	return []Package{{Name: "bash", Version: "5.2+1", Arch: "amd64"}}, put(dst, BaseFile, "base "+s.epoch)
}

func (s *fakeSource) Kernel(_ context.Context, dst string, _ *progress.Step) (Kernel, []Package, error) {
	s.calls["kernel"]++
	tree := ModulesTree + "/6.12-test/"
	err := errors.Join(
		put(dst, KernelFile, "kernel "+s.epoch), put(dst, ModulesFile, "modules"),
		put(dst, tree+"modules.dep", ""), put(dst, tree+"modules.alias", ""), s.fail["kernel"])
	return Kernel{Release: "6.12-test", Package: "linux-image", Version: "6.12-1"}, nil, err
}

func (s *fakeSource) Firmware(_ context.Context, dst string, _ *progress.Step) ([]Package, error) {
	s.calls["firmware"]++
	return nil, nil
}

func (s *fakeSource) Loaders(_ context.Context, dst string, _ *progress.Step) ([]Package, error) {
	s.calls["loaders"]++
	var err error
	for _, name := range Loaders {
		err = errors.Join(err, put(dst, name, name))
	}
	return nil, err
}

func put(dir, name, data string) error {
	file := filepath.Join(dir, name)
	return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(data), 0o644))
}

func options(t *testing.T, source Source) BuildOptions {
	t.Helper()
	return BuildOptions{
		State: t.TempDir(), Cluster: configs.Default(), Source: source, Krg: []byte("krg binary"), Rescue: rescueArchive(t),
		Links: []Link{{"/usr/sbin/krgadm", "krg"}, {"/usr/bin/migrate", "../sbin/krg"}},
		Epoch: DefaultEpoch, Version: "test", Report: progress.Discard(),
	}
}

func rescueArchive(t *testing.T) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := cpio.Newc.Writer(&buf)
	if err := errors.Join(cpio.WriteRecords(w, []cpio.Record{cpio.StaticFile("bbin/bb", "busybox", 0o755)}), cpio.WriteTrailer(w)); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func mustBuild(t *testing.T, o BuildOptions) *Image {
	t.Helper()
	im, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func TestBuildMakesAVerifiedImage(t *testing.T) {
	o := options(t, newFakeSource())
	mustBuild(t, o)
	im, err := Current(o.State)
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Verify(); err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{KernelFile, InitramfsFile, BaseFile, ModulesFile, OverlayFile, SBOMFile}, "boot/snponly.efi") {
		if im.Digest(name) == "" {
			t.Errorf("the manifest lacks %s", name)
		}
	}
	var bom struct {
		BomFormat  string
		Components []struct{ Name, Purl string }
	}
	data, err := os.ReadFile(im.Path(SBOMFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &bom); err != nil || bom.BomFormat != "CycloneDX" {
		t.Fatalf("bill of materials: format %q, %v", bom.BomFormat, err)
	}
	if !strings.Contains(string(data), `"pkg:deb/debian/bash@5.2%2B1?arch=amd64\u0026distro=trixie"`) &&
		!strings.Contains(string(data), `"pkg:deb/debian/bash@5.2%2B1?arch=amd64&distro=trixie"`) {
		t.Errorf("bill of materials doesn't name the package:\n%s", data)
	}
}

func TestSameInputsGiveTheSameBytes(t *testing.T) {
	a, b := mustBuild(t, options(t, newFakeSource())), mustBuild(t, options(t, newFakeSource()))
	if diff := cmp.Diff(a.Manifest, b.Manifest); diff != "" {
		t.Errorf("two builds differ:\n%s", diff)
	}
}

func TestPartsAreMadeOnlyWhenTheirInputsChange(t *testing.T) {
	tests := []struct {
		name   string
		change func(*BuildOptions)
		want   map[string]int // calls of the second build
	}{
		{"nothing", func(*BuildOptions) {}, map[string]int{}},
		{"name only", func(o *BuildOptions) { o.Cluster.Name = "other" }, map[string]int{}},
		{"node table", func(o *BuildOptions) { o.Cluster.Nodes.Unknown = "refuse" }, map[string]int{}},
		{"packages", func(o *BuildOptions) { o.Cluster.Debian.Packages = []string{"gcc"} }, map[string]int{"packages": 1}},
		{"kernel flavour", func(o *BuildOptions) { o.Cluster.Kernel.Flavour = "cloud-amd64" }, map[string]int{"kernel": 1}},
		{"firmware", func(o *BuildOptions) { o.Cluster.Initramfs.Firmware = nil }, map[string]int{"firmware": 1}},
		{"mirror", func(o *BuildOptions) { o.Cluster.Debian.Mirror = "http://mirror.example/debian" },
			map[string]int{"packages": 1, "kernel": 1, "firmware": 1, "loaders": 1}},
		{"forced", func(o *BuildOptions) { o.Rebuild = []string{"loaders"} }, map[string]int{"loaders": 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			source := newFakeSource()
			o := options(t, source)
			mustBuild(t, o)
			source.calls = map[string]int{}
			tt.change(&o)
			mustBuild(t, o)
			if diff := cmp.Diff(tt.want, source.calls); diff != "" {
				t.Errorf("parts made by the second build (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUnknownPart(t *testing.T) {
	o := options(t, newFakeSource())
	o.Rebuild = []string{"kernal"}
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "kernel") {
		t.Fatalf("error = %v, want one that lists the parts", err)
	}
}

func TestFailedBuildLeavesThePreviousImage(t *testing.T) {
	source := newFakeSource()
	o := options(t, source)
	before := mustBuild(t, o)
	source.epoch = "2"
	source.fail["kernel"] = errors.New("mirror went away")
	o.Rebuild = []string{"all"}
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "mirror went away") {
		t.Fatalf("error = %v, want the mirror's", err)
	}
	assertCurrent(t, o.State, before)

	delete(source.fail, "kernel")
	after := mustBuild(t, o)
	if after.Manifest.BuildID == before.Manifest.BuildID {
		t.Error("the new build has the old image's id")
	}
	assertCurrent(t, o.State, after)
}

func TestCancelledBuildLeavesThePreviousImage(t *testing.T) {
	source := newFakeSource()
	o := options(t, source)
	before := mustBuild(t, o)
	source.epoch = "2"
	o.Rebuild = []string{"all"}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Build(ctx, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("error = %v, want %v", err, context.Canceled)
	}
	assertCurrent(t, o.State, before)
}

func assertCurrent(t *testing.T, state string, want *Image) {
	t.Helper()
	im, err := Current(state)
	if err != nil {
		t.Fatal(err)
	}
	if im.Manifest.BuildID != want.Manifest.BuildID {
		t.Errorf("current image is %s, want %s", im.Manifest.BuildID, want.Manifest.BuildID)
	}
	if err := im.Verify(); err != nil {
		t.Error(err)
	}
}

func TestDamagedPartIsMadeAgain(t *testing.T) {
	source := newFakeSource()
	o := options(t, source)
	mustBuild(t, o)
	parts, err := filepath.Glob(filepath.Join(o.State, "parts/kernel/*", KernelFile))
	if err != nil || len(parts) != 1 {
		t.Fatalf("kernel parts: %v, %v", parts, err)
	}
	if err := os.Remove(parts[0]); err != nil {
		t.Fatal(err)
	}
	mustBuild(t, o)
	if source.calls["kernel"] != 2 {
		t.Errorf("the kernel was made %d times, want 2", source.calls["kernel"])
	}
}

func TestVerifyFindsDamage(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, file string)
		want   string
	}{
		{"truncated", func(t *testing.T, file string) { must(t, os.Truncate(file, 3)) }, "3 bytes, the manifest says"},
		{"changed", func(t *testing.T, file string) {
			data, err := os.ReadFile(file)
			must(t, err)
			data[0] ^= 1
			must(t, os.WriteFile(file, data, 0o644))
		}, "SHA-256"},
		{"missing", func(t *testing.T, file string) { must(t, os.Remove(file)) }, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := mustBuild(t, options(t, newFakeSource()))
			tt.damage(t, im.Path(InitramfsFile))
			var damaged *DamagedError
			if err := im.Verify(); !errors.As(err, &damaged) || !strings.Contains(damaged.Reason, tt.want) {
				t.Errorf("Verify = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestNoImage(t *testing.T) {
	if _, err := Current(t.TempDir()); !errors.Is(err, ErrNoImage) {
		t.Fatalf("error = %v, want %v", err, ErrNoImage)
	}
}

func TestSecondBuildIsRefused(t *testing.T) {
	o := options(t, newFakeSource())
	unlock, err := Lock(filepath.Join(o.State, "build.lock"), "build")
	must(t, err)
	var busy *BusyError
	if _, err := Build(t.Context(), o); !errors.As(err, &busy) {
		t.Fatalf("error = %v, want a BusyError", err)
	}
	if !strings.Contains(busy.Error(), "krgimage build, process") {
		t.Errorf("%q doesn't say who holds the lock", busy.Error())
	}
	unlock()
	mustBuild(t, o)
}

// fillingSource writes more than the disk holds.
type fillingSource struct{ *fakeSource }

func (s fillingSource) Base(_ context.Context, dst string, _ *progress.Step) ([]Package, error) {
	return nil, os.WriteFile(filepath.Join(dst, BaseFile), make([]byte, 8<<20), 0o644)
}

func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	o := options(t, newFakeSource())
	o.State = t.TempDir()
	must(t, unix.Mount("tmpfs", o.State, "tmpfs", 0, "size=4m"))
	t.Cleanup(func() { must(t, unix.Unmount(o.State, 0)) })
	before := mustBuild(t, o)

	o.Source = fillingSource{newFakeSource()}
	o.Rebuild = []string{"packages"}
	_, err := Build(t.Context(), o)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "is full") {
		t.Fatalf("error = %v, want one that says that the disk is full", err)
	}
	assertCurrent(t, o.State, before)
	left, err := filepath.Glob(filepath.Join(o.State, "parts/packages/*.partial"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestEpoch(t *testing.T) {
	for _, tt := range []struct {
		env  string
		want int64
		ok   bool
	}{{"", DefaultEpoch.Unix(), true}, {"0", 0, true}, {"1700000000", 1700000000, true}, {"yesterday", 0, false}, {"-5", 0, false}} {
		got, err := Epoch(tt.env)
		if (err == nil) != tt.ok || err == nil && got.Unix() != tt.want {
			t.Errorf("Epoch(%q) = %v, %v", tt.env, got, err)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
}
