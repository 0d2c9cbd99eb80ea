package live

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"krgimage/configs"
	"krgimage/nfsroot/meta"
)

const (
	managedDir = "etc/krgimage"
	keysDir    = managedDir + "/authorized_keys"
)

// sshdConfig is /etc/krgimage/sshd_config: the container's sshd, one on each
// node, all with the same key (sshd_config(5)). UsePAM stays on, as in Debian:
// limits and account expiry are PAM's.
const sshdConfig = `# Written by krgimage from cluster.yaml at every start: changes are overwritten.
Port 2222
HostKey /etc/ssh/` + hostKeyFile + `
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication %s
KbdInteractiveAuthentication no
PermitEmptyPasswords no
AuthorizedKeysFile /etc/krgimage/authorized_keys/%%u .ssh/authorized_keys
UsePAM yes
UseDNS no
X11Forwarding no
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_*
LoginGraceTime 120
ClientAliveInterval 60
MaxStartups 64:30:256
Subsystem sftp /usr/lib/openssh/sftp-server
`

// writeManaged writes what is ours in a live root.
func writeManaged(root meta.Root, in Input, key hostKey) error {
	for _, dir := range []struct {
		name string
		mode fs.FileMode
	}{
		{managedDir, 0o755}, {keysDir, 0o755}, {"etc/ssh", 0o755},
	} {
		if err := makeDir(root, dir.name, dir.mode); err != nil {
			return err
		}
	}
	password := "no"
	if in.Cluster.SSH.PasswordLogin {
		password = "yes"
	}
	hosts, err := hostsFile(root, in.Cluster.Name, in.Hosts)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{
		{managedDir + "/sshd_config", fmt.Appendf(nil, sshdConfig, password), 0o644},
		{"etc/ssh/" + hostKeyFile, key.private, 0o600},
		{"etc/ssh/" + hostKeyFile + ".pub", []byte(key.public + "\n"), 0o644},
		{"etc/hosts", hosts, 0o644},
	} {
		if err := replaceFile(root, f.name, f.data, f.mode, 0, 0); err != nil {
			return err
		}
	}
	return writeKeys(root, in)
}

// writeKeys writes one key file for root and each user, and removes those of
// accounts that are gone. The files belong to root, so an account cannot lock
// the administrator out.
func writeKeys(root meta.Root, in Input) error {
	everyone := slices.Concat(in.Cluster.SSH.Keys, in.ExtraKeys)
	files := map[string][]string{"root": everyone}
	for _, u := range in.Cluster.Users {
		files[u.Name] = slices.Concat(everyone, u.Keys)
	}
	for name, keys := range files {
		if err := replaceFile(root, path.Join(keysDir, name), keyFile(keys), 0o644, 0, 0); err != nil {
			return err
		}
	}
	there, err := fs.ReadDir(root.FS(), keysDir)
	if err != nil {
		return err
	}
	for _, entry := range there {
		name := entry.Name()
		if _, ok := files[name]; !ok {
			if err := root.RemoveAll(path.Join(keysDir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func keyFile(keys []string) []byte {
	var b bytes.Buffer
	b.WriteString("# Written by krgimage from cluster.yaml: changes are overwritten. ~/.ssh/authorized_keys counts too.\n")
	var seen []string
	for _, key := range keys {
		// One key a line: a line break inside would smuggle in another.
		key = strings.TrimSpace(strings.NewReplacer("\n", " ", "\r", " ").Replace(key))
		if key != "" && !slices.Contains(seen, key) {
			seen = append(seen, key)
			b.WriteString(key + "\n")
		}
	}
	return b.Bytes()
}

const (
	hostsBegin = "# BEGIN krgimage: the nodes; changes in here are overwritten\n"
	hostsEnd   = "# END krgimage\n"
)

// hostsFile is hosts(5) with our block renewed and the rest as it was.
func hostsFile(root meta.Root, domain string, hosts []Host) ([]byte, error) {
	old, err := root.ReadFile("etc/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	rest := string(old)
	if before, after, ok := strings.Cut(rest, hostsBegin); ok {
		if _, tail, ok := strings.Cut(after, hostsEnd); ok {
			rest = before + tail
		}
	}
	if strings.TrimSpace(rest) == "" {
		rest = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	}
	hosts = slices.SortedFunc(slices.Values(hosts), func(a, b Host) int { return a.Address.Compare(b.Address) })
	var b strings.Builder
	b.WriteString(strings.TrimRight(rest, "\n") + "\n" + hostsBegin)
	for _, h := range hosts {
		if len(h.Names) == 0 || !h.Address.IsValid() {
			continue
		}
		names := slices.Clone(h.Names)
		if domain != "" && !strings.Contains(names[0], ".") {
			names = append(names, names[0]+"."+domain)
		}
		fmt.Fprintf(&b, "%s\t%s\n", h.Address, strings.Join(names, " "))
	}
	b.WriteString(hostsEnd)
	return []byte(b.String()), nil
}

// pristine finishes a freshly unpacked root: files that people may change
// afterwards, so that they are written once.
func pristine(root meta.Root, c configs.Cluster) error {
	for _, dir := range []struct {
		name string
		mode fs.FileMode
	}{
		{"home", 0o755}, {"srv", 0o755}, {"opt", 0o755}, {"tmp", 0o777 | fs.ModeSticky},
		{"proc", 0o555}, {"sys", 0o555}, {"dev", 0o755}, {"run", 0o755}, {"mnt", 0o755},
		{"etc", 0o755}, {"var", 0o755}, {"var/tmp", 0o777 | fs.ModeSticky},
		// Kerrighed's checkpoints: any user's.
		{"var/chkpt", 0o777 | fs.ModeSticky},
	} {
		if err := makeDir(root, dir.name, dir.mode); err != nil {
			return err
		}
	}
	motd := fmt.Sprintf("Cluster %s, session %d. The files are the same on every node; 'krg node' tells which one this is.\n", c.Name, c.SessionID)
	for _, f := range []struct{ name, text string }{
		{"etc/fstab", "# The nodes mount this root over NFS at boot; nothing is mounted from here.\n"},
		{"etc/motd", motd},
	} {
		if err := replaceFile(root, f.name, []byte(f.text), 0o644, 0, 0); err != nil {
			return err
		}
	}
	// Each node has its own in its own /run.
	for _, l := range []struct{ name, target string }{
		{"etc/resolv.conf", "/run/krg/resolv.conf"},
		{"etc/machine-id", "/run/krg/machine-id"},
		{"etc/mtab", "../proc/self/mounts"},
	} {
		if err := replaceLink(root, l.target, l.name); err != nil {
			return err
		}
	}
	return nil
}

// configureAccounts brings the accounts of cluster.yaml into a root and their
// directories into homes, and returns the accounts that were removed.
func configureAccounts(root, homes meta.Root, users []configs.User, before []string) (gone []string, err error) {
	a, err := readAccounts(root)
	if err != nil {
		return nil, err
	}
	if gone, err = a.configure(users, before); err != nil {
		return nil, err
	}
	for _, u := range users {
		// The home directory comes first: an account without one is of no
		// use, a directory without an account harms nobody.
		home := a.passwd.find(u.Name)[5]
		if home != "/home/"+u.Name {
			continue // the administrator moved it
		}
		if err := makeHome(root, homes, u); err != nil {
			return nil, fmt.Errorf("home directory of %s: %w", u.Name, err)
		}
	}
	return gone, a.write(root)
}

// makeHome makes a missing home directory in homes from the root's /etc/skel.
func makeHome(root, homes meta.Root, u configs.User) error {
	if there, err := exists(homes, u.Name); there || err != nil {
		return err
	}
	aside := ".krgimage-new-" + u.Name
	if err := homes.RemoveAll(aside); err != nil {
		return err
	}
	if err := homes.Mkdir(aside, 0o700); err != nil {
		return err
	}
	err := fs.WalkDir(root.FS(), "etc/skel", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := path.Join(aside, strings.TrimPrefix(name, "etc/skel"))
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case name == "etc/skel":
		case d.IsDir():
			err = homes.Mkdir(to, info.Mode().Perm())
		case info.Mode()&fs.ModeSymlink != 0:
			var target string
			if target, err = root.Readlink(name); err == nil {
				err = homes.Symlink(target, to)
			}
		case info.Mode().IsRegular():
			err = copyFile(root, name, homes, to, info.Mode().Perm())
		default:
			return nil
		}
		return cmp.Or(err, homes.Lchown(to, u.UID, u.UID))
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := homes.Lchown(aside, u.UID, u.UID); err != nil {
		return err
	}
	return homes.Rename(aside, u.Name)
}

func copyFile(root meta.Root, from string, dest meta.Root, to string, mode fs.FileMode) error {
	in, err := root.OpenFile(from, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := dest.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Close()
}
