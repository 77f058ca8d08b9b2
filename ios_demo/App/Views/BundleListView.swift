import EdgeLlamaCore
import SwiftUI
import UniformTypeIdentifiers

/// The bundles on this device, and the import of another.
struct BundleListView: View {
    @State private var bundles: [URL] = []
    @State private var isImporting: Bool = false
    @State private var error: String?

    var body: some View {
        NavigationStack {
            List {
                if let error: String = error { ErrorText(error) }
                ForEach(bundles, id: \.self) { (directory: URL) in
                    NavigationLink(directory.lastPathComponent, value: directory)
                }
            }
            .overlay { if bundles.isEmpty { empty } }
            .navigationTitle("edgellama")
            .navigationDestination(for: URL.self) { (directory: URL) in
                BundleView(directory: directory)
            }
            .toolbar {
                Button("Import a bundle", systemImage: "square.and.arrow.down") { isImporting = true }
            }
            .fileImporter(isPresented: $isImporting, allowedContentTypes: [.folder]) { (result: Result<URL, any Error>) in
                add(result)
            }
            .onAppear {
                Models.shared.release()  // nobody is using a model here
                refresh()
            }
            .refreshable { refresh() }
        }
    }

    private var empty: some View {
        ContentUnavailableView(
            "No bundle on this device",
            systemImage: "shippingbox",
            description: Text("Import a directory that edgellama export wrote, or copy one into this app with Finder or Files.")
        )
    }

    private func refresh() {
        bundles = Storage.bundles()
    }

    private func add(_ result: Result<URL, any Error>) {
        do {
            _ = try Storage.add(try result.get())
            error = nil
        } catch let found {
            error = sentence(found)
        }
        refresh()
    }
}

/// Why something could not be done, and what to do about it.
struct ErrorText: View {
    private let text: String

    init(_ text: String) {
        self.text = text
    }

    var body: some View {
        Label(text, systemImage: "exclamationmark.triangle")
            .foregroundStyle(.red)
            .textSelection(.enabled)
            .accessibilityLabel("Error: \(text)")
    }
}
