package debian

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"krgimage/images/progress"
	"krgimage/nfsroot/debian/space"
	"krgimage/nfsroot/debian/tarfs"
)

// BasePackages is what every root has besides Debian's essential packages and
// apt: a shell to log in to, and the tools to look at processes and the network.
// systemd-standalone-sysusers stands for systemd, which openssh-server would
// bring in otherwise. There is no kernel: nodes get theirs over the network.
func BasePackages() []string {
	return []string{
		"bash", "bash-completion", "coreutils", "iproute2", "iputils-ping", "less", "login", "mount", "nano",
		"netbase", "openssh-server", "passwd", "procps", "psmisc", "systemd-standalone-sysusers",
	}
}

// BootstrapOptions say what goes into a root.
type BootstrapOptions struct {
	Packages []string  // besides BasePackages
	Epoch    time.Time // no file is newer; SOURCE_DATE_EPOCH of the build
}

// Base is a finished root archive.
type Base struct {
	Path     string
	Size     int64     // bytes, compressed
	Unpacked int64     // bytes of file content
	Packages []Package // installed, sorted by name
}

// rootNeeds is what the temporary root of the base packages takes, bytes.
const rootNeeds = 700 << 20

// Bootstrap builds the Debian root and writes it to out as base.tar.zst. The
// same packages and epoch give the same bytes. Nothing in it is tied to this
// machine or to one boot: no host keys, no machine id, no logs, no address of
// the build's proxy.
func (r *Repo) Bootstrap(ctx context.Context, opt BootstrapOptions, out string) (Base, error) {
	packages := append(BasePackages(), opt.Packages...)
	for _, m := range r.mirrors {
		if m.upstream.Scheme == "https" {
			packages = append(packages, "ca-certificates") // apt in the root
		}
	}
	slices.Sort(packages)
	packages = slices.Compact(packages)
	if err := r.Check(ctx, packages); err != nil {
		return Base{}, err
	}
	r.apt.Lock()
	defer r.apt.Unlock()
	step := r.opt.Progress.Step("Debian root")
	base, err := r.bootstrap(ctx, step, packages, opt.Epoch, out)
	if err != nil {
		return Base{}, step.Fail(fmt.Errorf("debian root: %w", space.Explain(err, "the Debian root is built", r.opt.WorkDir, rootNeeds)))
	}
	step.Done("%d packages, %s", len(base.Packages), progress.Size(base.Size))
	return base, nil
}

func (r *Repo) bootstrap(ctx context.Context, step *progress.Step, packages []string, epoch time.Time, out string) (Base, error) {
	program, err := findTool("mmdebstrap")
	if err != nil {
		return Base{}, err
	}
	tmp, err := r.tempTree()
	if err != nil {
		return Base{}, err
	}
	defer r.removeTree(tmp)
	if err := space.Require("the Debian root is built", tmp, rootNeeds); err != nil {
		return Base{}, err
	}
	logPath := filepath.Join(r.opt.WorkDir, "mmdebstrap.log")
	log, err := os.Create(logPath)
	if err != nil {
		return Base{}, err
	}
	defer log.Close()

	args := []string{
		"--variant=minbase", "--mode=auto", "--format=tar", "--architectures=amd64",
		"--keyring=" + r.keyring,
		"--include=" + strings.Join(packages, ","),
		`--aptopt=Acquire::http::Proxy "` + r.proxy.url + `"`,
		`--aptopt=Acquire::https::Proxy "DIRECT"`,
		`--aptopt=Acquire::Retries "3"`,
		`--aptopt=Acquire::Languages "none"`,
		`--aptopt=APT::Install-Recommends "false"`,
	}
	for _, setting := range r.archiveSettings() {
		args = append(args, "--aptopt="+strings.TrimSuffix(setting, ";"))
	}
	args = append(args, r.opt.Suite, "-", "-")
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = cleanEnv("TMPDIR="+tmp, "SOURCE_DATE_EPOCH="+strconv.FormatInt(epoch.Unix(), 10))
	cmd.Stdin = strings.NewReader(r.sources(r.opt.Components))
	cmd.Dir = tmp
	stopGently(cmd)

	r.proxy.takeErr()
	end := r.proxy.watch(func(n int64) { step.Bytes(n, 0) })
	defer end()
	var base Base
	err = writeArchive("the Debian root is built", out, 80<<20, nil, func(w io.Writer) error {
		runErr, readErr := pipeRun(cmd, log, step, func(archive io.Reader) error {
			f := rootFilter{epoch: epoch, sources: r.finalSources()}
			if err := f.copy(archive, w); err != nil {
				return err
			}
			base.Unpacked, base.Packages = f.bytes, f.packages
			return nil
		})
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case runErr != nil && (readErr == nil || !space.Explains(readErr)):
			return r.explainIn("the Debian root's packages", logPath, tmp, runErr)
		}
		return readErr
	})
	if err != nil {
		return Base{}, err
	}
	info, err := os.Stat(out)
	if err != nil {
		return Base{}, err
	}
	base.Path, base.Size = out, info.Size()
	return base, nil
}

// pipeRun runs cmd with its standard output read by read and its messages going
// to log and, the informative ones, to step. It returns the program's failure
// and the reader's apart; each often follows from the other.
func pipeRun(cmd *exec.Cmd, log io.Writer, step *progress.Step, read func(io.Reader) error) (runErr, readErr error) {
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err, nil
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err, nil
	}
	if err := cmd.Start(); err != nil {
		return err, nil
	}
	var group errgroup.Group
	group.Go(func() error {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			fmt.Fprintln(log, lines.Text())
			if note, ok := strings.CutPrefix(lines.Text(), "I: "); ok {
				step.Note("%s", note)
			}
		}
		// The program must not block on a message that is too long.
		_, err := io.Copy(log, stderr)
		return err
	})
	group.Go(func() error {
		readErr = read(stdout)
		if readErr != nil {
			cmd.Cancel() // it has no use for a reader that is gone
		}
		io.Copy(io.Discard, stdout)
		return nil
	})
	group.Wait()
	return cmd.Wait(), readErr
}

// tempTree is a new directory for mmdebstrap's temporary root. A normal user's
// root is owned by subordinate ids, which may not pass through a private home
// directory; /tmp is often too small and in memory.
func (r *Repo) tempTree() (string, error) {
	parent := r.opt.WorkDir
	if os.Geteuid() != 0 {
		parent = "/var/tmp"
	}
	dir, err := os.MkdirTemp(parent, "krgimage-root-")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// removeTree deletes what is left of a temporary root, but never follows a
// mount that an ended program left in it: a bind mount of the host's /dev, say.
func (r *Repo) removeTree(dir string) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(" "+dir+"/")) {
		r.log.Warn("a temporary root still has file systems mounted in it; unmount and remove it by hand", "dir", dir)
		return
	}
	if err := os.RemoveAll(dir); err != nil {
		r.log.Warn("a temporary root could not be removed", "dir", dir, "err", err)
	}
}

// rootFilter rewrites mmdebstrap's archive: what belongs to the build machine or
// to one build goes, what every root of ours has comes in.
type rootFilter struct {
	epoch   time.Time
	sources string // debian.sources

	bytes    int64
	packages []Package
}

// policyRC keeps packages that are installed in the running cluster from
// starting daemons on whichever node apt runs on (invoke-rc.d(8)).
const policyRC = "#!/bin/sh\n# Services of this cluster are not started by packages.\nexit 101\n"

// dropped reports whether an entry of the raw root is left out, and whether its
// descendants are.
func dropped(name string) bool {
	dir, base := filepath.Split(name)
	switch {
	case dir == "etc/ssh/" && strings.HasPrefix(base, "ssh_host_"):
		return true // one set per cluster, put in when a root goes live
	case base == "99mmdebstrap":
		return true // the build's proxy
	case dir == "etc/apt/sources.list.d/" || name == "etc/apt/sources.list":
		return true
	}
	for _, path := range []string{
		"etc/machine-id", "etc/hostname", "etc/resolv.conf", "var/lib/dbus/machine-id",
		"etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/subuid-", "etc/subgid-",
		"var/cache/ldconfig/aux-cache", "usr/sbin/policy-rc.d", "var/log/bootstrap.log",
	} {
		if name == path {
			return true
		}
	}
	for _, tree := range []string{"run/", "tmp/", "var/tmp/", "var/cache/apt/", "var/cache/debconf/", "var/lib/apt/lists/", "var/log/"} {
		if strings.HasPrefix(name, tree) {
			// Directories that packages brought stay: daemons expect them.
			return tree != "var/log/" || base != ""
		}
	}
	return false
}

func (f *rootFilter) copy(r io.Reader, w io.Writer) error {
	in, out := tar.NewReader(r), tar.NewWriter(w)
	seen := false
	for {
		hdr, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read the root's archive: %w", err)
		}
		seen = true
		name, err := tarfs.Clean(hdr.Name)
		if err != nil {
			return err
		}
		isDir := hdr.Typeflag == tar.TypeDir
		if dropped(name) && !(isDir && strings.HasPrefix(name, "var/log/")) {
			continue
		}
		var body io.Reader = in
		if name == "var/lib/dpkg/status" {
			status, err := io.ReadAll(in)
			if err != nil {
				return err
			}
			if f.packages, err = ParseStatus(bytes.NewReader(status)); err != nil {
				return err
			}
			body = bytes.NewReader(status)
		}
		h := tarfs.Header(hdr, f.epoch)
		h.Name = name
		if isDir {
			h.Name += "/"
		}
		if err := out.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		n, err := io.Copy(out, body)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		f.bytes += n
	}
	if !seen || len(f.packages) == 0 {
		return errors.New("the root's archive has no packages in it")
	}
	for _, file := range []struct {
		name, text string
		mode       int64
	}{
		{"etc/apt/sources.list.d/debian.sources", f.sources, 0o644},
		{"usr/sbin/policy-rc.d", policyRC, 0o755},
	} {
		hdr := &tar.Header{Typeflag: tar.TypeReg, Name: file.name, Mode: file.mode, Size: int64(len(file.text)), ModTime: f.epoch}
		if err := out.WriteHeader(hdr); err != nil {
			return err
		}
		if _, err := io.WriteString(out, file.text); err != nil {
			return err
		}
	}
	return out.Close()
}
