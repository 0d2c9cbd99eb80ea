package debian

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"krgimage/configs"
	"krgimage/images/progress"
	"krgimage/nfsroot/debian/space"
)

// The tests of this file use the real mirror and build real roots; they take
// minutes.
func needMirror(t *testing.T) *Repo {
	t.Helper()
	if os.Getenv("KRGIMAGE_TEST_MIRROR") == "" {
		t.Skip("set KRGIMAGE_TEST_MIRROR=1 to build from the Debian mirror")
	}
	for _, c := range Preflight("trixie") {
		if !c.OK {
			t.Skipf("%s: %s (%s)", c.Name, c.Why, c.Fix)
		}
	}
	cache := os.Getenv("KRGIMAGE_TEST_CACHE")
	if cache == "" {
		cache = t.TempDir()
	}
	d := configs.Default().Debian
	repo, err := Open(t.Context(), Options{
		Suite: d.Suite, Mirror: d.Mirror, Security: d.Security, Components: d.Components,
		CacheDir: cache, WorkDir: t.TempDir(),
		Progress: progress.New(os.Stderr, progress.Plain),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

func TestBootstrapTwiceSameBytes(t *testing.T) {
	repo := needMirror(t)
	epoch := time.Unix(1760000000, 0)
	var sums []string
	for _, name := range []string{"a", "b"} {
		out := filepath.Join(t.TempDir(), name+".tar.zst")
		base, err := repo.Bootstrap(t.Context(), BootstrapOptions{Packages: []string{"file"}, Epoch: epoch}, out)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(base.Packages, func(p Package) bool { return p.Name == "file" && p.Version != "" && p.Arch != "" }) {
			t.Errorf("the package list lacks what was asked for: %v", base.Packages)
		}
		sum, err := sha256File(out)
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, sum)
		if name == "a" {
			checkRoot(t, out, epoch)
		}
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds of the same differ: %v", sums)
	}
}

func checkRoot(t *testing.T, path string, epoch time.Time) {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	in := tar.NewReader(z)
	seen := map[string]bool{}
	for {
		hdr, err := in.Next()
		if err != nil {
			break
		}
		name := strings.TrimSuffix(hdr.Name, "/")
		seen[name] = true
		if hdr.ModTime.After(epoch) {
			t.Errorf("%s is newer than the epoch: %v", name, hdr.ModTime)
		}
		if strings.HasPrefix(name, "etc/ssh/ssh_host_") || strings.HasPrefix(name, "boot/vmlinuz") || strings.Contains(name, "mmdebstrap") {
			t.Errorf("%s should not be in a root", name)
		}
	}
	for _, name := range []string{"usr/sbin/sshd", "bin", "etc/apt/sources.list.d/debian.sources", "usr/sbin/policy-rc.d", "var/lib/dpkg/status", "usr/bin/ps", strings.TrimPrefix(rootKeyring, "/")} {
		if !seen[name] {
			t.Errorf("the root lacks %s", name)
		}
	}
	for _, name := range []string{"etc/machine-id", "etc/hostname", "etc/resolv.conf", "usr/lib/systemd/systemd"} {
		if seen[name] {
			t.Errorf("%s should not be in a root", name)
		}
	}
}

func TestKernelAndDownloads(t *testing.T) {
	repo := needMirror(t)
	k, err := repo.Kernel(t.Context(), "amd64", filepath.Join(t.TempDir(), "kernel"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(k.Release, "-amd64") {
		t.Errorf("release %q", k.Release)
	}
	for _, path := range []string{k.Vmlinuz, filepath.Join(k.Modules, "modules.dep"), filepath.Join(k.Modules, "kernel/fs/nfs/nfsv3.ko.xz")} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	var sums []string
	for _, name := range []string{"a", "b"} {
		out := filepath.Join(t.TempDir(), name)
		if err := ModulesTar(t.Context(), k, time.Unix(1760000000, 0), out, nil); err != nil {
			t.Fatal(err)
		}
		sum, _ := sha256File(out)
		sums = append(sums, sum)
	}
	if sums[0] != sums[1] {
		t.Error("the modules were packed differently the second time")
	}
	files, err := repo.Download(t.Context(), []string{"ipxe", "pxelinux", "syslinux-common", "firmware-realtek"})
	if err != nil {
		t.Fatal(err)
	}
	dst := t.TempDir()
	if err := ExtractDeb(t.Context(), files[0].Path, func(name string) bool { return name == "usr/lib/ipxe/snponly.efi" }, dst); err != nil {
		t.Error(err)
	}
	for _, f := range files {
		if sum, err := sha256File(f.Path); err != nil || sum != f.SHA256 {
			t.Errorf("%s: %s, %v", f.Name, sum, err)
		}
	}
}

func TestNoSuchPackage(t *testing.T) {
	repo := needMirror(t)
	_, err := repo.Bootstrap(t.Context(), BootstrapOptions{Packages: []string{"psmics"}}, filepath.Join(t.TempDir(), "out"))
	if err == nil || !strings.Contains(err.Error(), "psmisc") {
		t.Errorf("%v", err)
	}
}

// A build that is stopped or runs out of space leaves no file, no temporary
// root and no mount behind, and the previous output as it was.
func TestBootstrapStopped(t *testing.T) {
	repo := needMirror(t)
	if err := repo.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stopped by hand")
	for _, test := range []struct {
		name string
		dir  func(t *testing.T) string
		stop bool
	}{
		{"by hand", func(t *testing.T) string { return t.TempDir() }, true},
		{"full disk", func(t *testing.T) string { return smallDisk(t, "8m") }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			out := filepath.Join(test.dir(t), "base.tar.zst")
			if err := os.WriteFile(out, []byte("old"), 0o644); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if test.stop {
				// mmdebstrap says what it does in its log: stop it in the
				// middle of the installation.
				go func() {
					log := filepath.Join(repo.opt.WorkDir, "mmdebstrap.log")
					for ctx.Err() == nil {
						if text, _ := os.ReadFile(log); strings.Contains(string(text), "installing essential packages") {
							cancel(stop)
						}
						time.Sleep(20 * time.Millisecond)
					}
				}()
			}
			_, err := repo.Bootstrap(ctx, BootstrapOptions{Epoch: time.Unix(1760000000, 0)}, out)
			var full *space.Error
			switch {
			case test.stop && !errors.Is(err, stop):
				t.Errorf("%v", err)
			case !test.stop && (!errors.As(err, &full) || full.Mount != filepath.Dir(out)):
				t.Errorf("%v", err)
			}
			if got, _ := os.ReadFile(out); string(got) != "old" {
				t.Errorf("the old output is now %.20q", got)
			}
			if entries, _ := os.ReadDir(filepath.Dir(out)); len(entries) != 1 {
				t.Errorf("left over beside the output: %v", entries)
			}
			if left, _ := filepath.Glob(filepath.Join(repo.opt.WorkDir, "krgimage-root-*")); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
		})
	}
}
