import EdgeLlamaCore
import SwiftUI
import UIKit

@main
struct EdgeLlamaApp: App {
    /// The model is by far the largest thing that this process holds; it is loaded again when it is next asked.
    private static let memoryWarnings: NotificationCenter.Publisher = NotificationCenter.default.publisher(
        for: UIApplication.didReceiveMemoryWarningNotification
    )

    private let command: CheckCommand? = CheckCommand(Array(ProcessInfo.processInfo.arguments.dropFirst()))

    var body: some Scene {
        WindowGroup {
            if let command: CheckCommand = command {
                CommandView(command: command)
            } else {
                BundleListView()
                    .onReceive(EdgeLlamaApp.memoryWarnings) { _ in Models.shared.release() }
            }
        }
    }
}

/// What a person sees while a script's check runs.
private struct CommandView: View {
    let command: CheckCommand

    var body: some View {
        ProgressView("Accuracy check for a script")
            .task {
                let code: Int32 = await command.run()
                fflush(nil)
                exit(code)
            }
    }
}
