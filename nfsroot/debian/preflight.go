package debian

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Check is one thing that a build needs of this machine.
type Check struct {
	Name string // "mmdebstrap"
	OK   bool
	Why  string // what it is for, or what is wrong
	Fix  string // what to do; empty when OK
}

// Preflight says whether this machine can build a root of the suite.
func Preflight(suite string) []Check {
	checks := []Check{
		toolCheck("apt-get", "apt", "resolves packages from the archive's signed metadata"),
		toolCheck("dpkg-deb", "dpkg", "unpacks packages for mmdebstrap"),
		toolCheck("mmdebstrap", "mmdebstrap", "builds the Debian root"),
		toolCheck("tar", "tar", "packs the Debian root"),
		verifierCheck(),
		toolCheck("depmod", "kmod", "indexes the kernel modules"),
		keyringCheck(suite),
	}
	if os.Geteuid() != 0 {
		checks = append(checks,
			toolCheck("newuidmap", "uidmap", "lets a normal user build a root with root's files in it"),
			subuidCheck())
	}
	return checks
}

func toolCheck(tool, pkg, why string) Check {
	c := Check{Name: tool, Why: why, OK: true}
	if _, err := findTool(tool); err != nil {
		c.OK, c.Why, c.Fix = false, "missing; it "+why, "apt-get install "+pkg
	}
	return c
}

// verifierCheck looks for what apt checks signatures with: gpgv, from Debian 13
// on sqv.
func verifierCheck() Check {
	if c := toolCheck("sqv", "sqv", "checks the archive's signature"); c.OK {
		return c
	}
	return toolCheck("gpgv", "gpgv", "checks the archive's signature")
}

// toolPackages are the packages of the programs that are run.
var toolPackages = map[string]string{
	"apt-get": "apt", "mmdebstrap": "mmdebstrap", "depmod": "kmod",
}

// findTool looks a program up in PATH and where root's programs are, which a
// normal user's PATH lacks.
func findTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	pkg := toolPackages[name]
	if pkg == "" {
		pkg = name
	}
	return "", fmt.Errorf("the program %s is missing\n  fix: apt-get install %s", name, pkg)
}

const keyringDir = "/usr/share/keyrings"

func findKeyring(configured string) (string, error) {
	candidates := []string{configured}
	if configured == "" {
		candidates = []string{keyringDir + "/debian-archive-keyring.gpg", keyringDir + "/debian-archive-keyring.pgp"}
	}
	for _, path := range candidates {
		if _, err := os.Stat(path); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", fmt.Errorf("the Debian archive's keys are missing: %s\n  fix: apt-get install debian-archive-keyring", candidates[0])
}

// keyringCheck looks for the suite's own keys: debian-archive-keyring also has
// them one release a file. An archive is mostly signed with the keys of the
// release before too, so this alone stops no build.
func keyringCheck(suite string) Check {
	c := Check{Name: "archive keys", Why: "check the archive's signature", OK: true}
	if _, err := findKeyring(""); err != nil {
		c.OK, c.Why, c.Fix = false, "missing", "apt-get install debian-archive-keyring"
		return c
	}
	all, _ := filepath.Glob(keyringDir + "/debian-archive-*-automatic.*")
	own, _ := filepath.Glob(keyringDir + "/debian-archive-" + suite + "-automatic.*")
	if len(all) > 0 && len(own) == 0 && suite != "sid" && suite != "unstable" && suite != "testing" {
		c.OK, c.Why = false, "debian-archive-keyring is older than "+suite
		c.Fix = "apt-get install debian-archive-keyring (the newest of this release or its updates)"
	}
	return c
}

func subuidCheck() Check {
	c := Check{Name: "subordinate ids", Why: "own the root's files while a normal user builds it", OK: true}
	me, err := user.Current()
	if err != nil {
		return c
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		text, _ := os.ReadFile(file)
		found := false
		for line := range strings.Lines(string(text)) {
			name, _, _ := strings.Cut(line, ":")
			found = found || name == me.Username || name == me.Uid
		}
		if !found {
			c.OK, c.Why = false, file+" has no line for "+me.Username
			c.Fix = "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 " + me.Username
			return c
		}
	}
	return c
}

// stopGently makes a cancelled program get SIGTERM with all its children, and
// time to remove what it left about, before it is killed.
func stopGently(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
}
